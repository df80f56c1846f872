"""A conversion that was killed, anywhere, ends as an undisturbed one once it is started again."""

from __future__ import annotations

import multiprocessing
import random
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.integration.conversion_child import child, convert
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
    # The index names the folder and the options, which differ.
    assert _contents(out, without=".metadata") == _contents(tmp_path / "fresh", without=".metadata")


def test_finished_files_are_not_written_again(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path), tmp_path / "out"
    assert _start("to_megatron", source, out, 60, None).exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_ino for path in _partial(out).glob("*.distcp")}
    finished = _finished_files(out)
    convert("to_megatron", source, out)
    kept = [name for name, inode in before.items() if (out / name).stat().st_ino == inode]
    assert finished >= 2 and len(kept) >= finished


def _contents(folder: Path, without: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != without}


def _finished_files(out: Path) -> int:
    journal = _partial(out) / "journal.jsonl"
    return max(0, len(journal.read_text().splitlines()) - 1) if journal.is_file() else 0


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _clear(out: Path) -> None:
    for folder in (out, _partial(out)):
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink()
        if folder.is_dir():
            folder.rmdir()
