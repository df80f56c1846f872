"""A conversion that was killed, anywhere, ends as an undisturbed one once it is started again."""

from __future__ import annotations

import multiprocessing
import random
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from megatron_rpp.conversion.to_megatron import ToMegatron, convert_to_megatron
from megatron_rpp.conversion.workspace import JOURNAL, open_workspace
from megatron_rpp.model.hf_io.chunked_file import ChunkedFile
from tests.integration.conversion_child import FILE_BYTES, child, convert
from tests.support.tiny_models import save_tiny

POINTS = 20


def _start(*arguments: object) -> ForkServerProcess:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.integration.conversion_child"])
    process = server.Process(target=child, args=arguments)
    process.start()
    process.join()
    return process


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_conversion_killed_at_random_points_ends_as_an_undisturbed_one(tmp_path: Path, direction: str) -> None:
    source = save_tiny("llama", tmp_path)
    if direction == "to_hf":
        convert("to_megatron", source, tmp_path / "megatron")
        source = tmp_path / "megatron"
    out, report = tmp_path / "out", tmp_path / "report"
    assert _start(direction, source, out, 0, report).exitcode == 0
    undisturbed = _contents(out)
    operations = int(report.read_text())
    assert len(undisturbed) > 6 and operations > 2 * POINTS, "a tiny model in one file would show little"
    continued = 0
    for point in random.Random(0).sample(range(1, operations + 1), POINTS):
        _clear(out)
        killed = _start(direction, source, out, point, None)
        assert killed.exitcode == -signal.SIGKILL
        if out.exists():  # after the rename, before it was known to be on disk
            assert _contents(out) == undisturbed
            continue
        kept = _finished_files(out)
        convert(direction, source, out)
        assert _contents(out) == undisturbed, f"killed at operation {point} of {operations}"
        assert not _partial(out).exists()
        continued += kept > 0
    assert continued >= POINTS // 3, "most kills should leave finished files, which the restart kept"


def test_partial_of_another_source_is_discarded_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, other, out = save_tiny("llama", tmp_path), save_tiny("llama3", tmp_path), tmp_path / "out"
    assert _start("to_megatron", other, out, 40, None).exitcode == -signal.SIGKILL
    assert _partial(out).is_dir()
    convert("to_megatron", source, out)
    assert "starting afresh" in capfd.readouterr().err
    convert("to_megatron", source, tmp_path / "fresh")
    # The index names the folder, which differs.
    assert _contents(out, without=".metadata") == _contents(tmp_path / "fresh", without=".metadata")


def test_finished_files_are_not_written_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = save_tiny("llama", tmp_path), tmp_path / "out"
    assert _start("to_megatron", source, out, 60, None).exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in _partial(out).glob("*.distcp")}
    finished = _finished_files(out)
    capfd.readouterr()
    convert("to_megatron", source, out)
    assert f"{finished} finished files are kept" in capfd.readouterr().err
    kept = [name for name, written in before.items() if (out / name).stat().st_mtime_ns == written]
    assert finished >= 2 and len(kept) >= finished


def test_interrupt_in_the_middle_of_a_write_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save makes a RuntimeError of it, which would otherwise count as an error and remove everything."""
    source, out, calls = save_tiny("llama", tmp_path), tmp_path / "out", []

    def interrupted(self: ChunkedFile, data: object) -> int:
        calls.append(data)
        if len(calls) == 300:
            raise KeyboardInterrupt
        return write(self, data)

    write = ChunkedFile.write
    monkeypatch.setattr(ChunkedFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("to_megatron", source, out)
    assert _finished_files(out) >= 1
    monkeypatch.setattr(ChunkedFile, "write", write)
    convert("to_megatron", source, out)
    convert("to_megatron", source, tmp_path / "undisturbed")
    undisturbed = _contents(tmp_path / "undisturbed", without=".metadata")  # it names the folder
    assert _contents(out, without=".metadata") == undisturbed


def test_options_that_change_nothing_and_other_spellings_continue_a_conversion(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = save_tiny("llama", tmp_path), tmp_path / "out"
    assert _start("to_megatron", source, out, 60, None).exitcode == -signal.SIGKILL
    asked = ToMegatron(f"{source}/", f"{tmp_path}/./out", tensor=2, pipeline=2, file_bytes=FILE_BYTES)
    convert_to_megatron(asked)
    assert "finished files are kept" in capfd.readouterr().err and out.is_dir()


def test_folder_in_the_way_that_is_no_conversions_is_left_alone(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path), tmp_path / "out"
    _partial(out).mkdir()
    (_partial(out) / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out\.partial is in the way"):
        convert("to_megatron", source, out)
    assert (_partial(out) / "notes.txt").read_text() == "precious"


def test_second_conversion_to_the_same_directory_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path), tmp_path / "out"
    with open_workspace(out, "key") as first:
        with pytest.raises(ValueError, match="another process is converting"):
            convert("to_megatron", source, out)
        assert first.folder.is_dir()


def _contents(folder: Path, without: str = "") -> dict[str, bytes]:
    """Not of the journal, which is removed last."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (JOURNAL, without)}


def _finished_files(out: Path) -> int:
    journal = _partial(out) / JOURNAL
    return max(0, len(journal.read_text().splitlines()) - 1) if journal.is_file() else 0


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _clear(out: Path) -> None:
    for folder in (out, _partial(out)):
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink()
        if folder.is_dir():
            folder.rmdir()
