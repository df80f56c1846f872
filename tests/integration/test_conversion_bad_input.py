"""Corrupt input and a full disk: exit code 2, one line that names file and tensor, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from tests.support.tiny_models import save_tiny

Q_PROJ, NORM = "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"
Damage = Callable[[Path], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path)


def _refused(
    capfd: pytest.CaptureFixture[str], main: Callable[[list[str]], int], source: Path, out: Path, *options: object
) -> str:
    """The one line."""
    capfd.readouterr()
    given = "--hf" if main is hf_to_megatron.main else "--megatron"
    assert main([given, str(source), "--out", str(out), *map(str, options)]) == 2
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    (line,) = capfd.readouterr().err.splitlines()
    assert ": error: " in line
    return line


def _rewrite(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def _truncate(source: Path) -> None:
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 100)


def _lose_a_shard(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    files = dict.fromkeys(load_file(source / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    files[NORM] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _rename_architecture(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["ParrotForCausalLM"]}))


def _grow_tokenizer(source: Path) -> None:
    vocab = {f"t{i}": i for i in range(20)}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))


DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated_file": (_truncate, ("model.safetensors", "cut off in the tensor")),
    "missing_shard": (_lose_a_shard, ("model-00002-of-00002.safetensors",)),
    "missing_tensor": (lambda s: _rewrite(s, lambda t: t.pop(Q_PROJ)), (Q_PROJ,)),
    "extra_tensor": (lambda s: _rewrite(s, lambda t: t.update(stray=torch.ones(2))), ("stray", "model.safetensors")),
    "wrong_shape": (
        lambda s: _rewrite(s, lambda t: t.update({Q_PROJ: torch.ones(30, 32)})),
        (Q_PROJ, "(30, 32)", "model.safetensors"),
    ),
    "unknown_architecture": (_rename_architecture, ("ParrotForCausalLM", "must be one of")),
    "tokenizer_larger_than_model": (_grow_tokenizer, ("tokenizer.json", "19")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_hugging_face_directory_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    damage, told = DAMAGE[what]
    damage(source)
    line = _refused(capfd, hf_to_megatron.main, source, tmp_path / "out")
    for text in told:
        assert text in line


def test_existing_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    assert hf_to_megatron.main(["--hf", str(source), "--out", str(out)]) == 2
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("option", ["--tp", "--pp", "--ep"])
def test_layout_that_does_not_divide_the_model_is_refused(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    assert "3" in _refused(capfd, hf_to_megatron.main, source, tmp_path / "out", option, 3)


def test_disk_without_room_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    assert "0.000 GB free" in _refused(capfd, hf_to_megatron.main, source, tmp_path / "out")


def _megatron(source: Path, tmp_path: Path) -> Path:
    there = tmp_path / "there"
    assert hf_to_megatron.main(["--hf", str(source), "--out", str(there)]) == 0
    return there


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: os.truncate(file, file.stat().st_size - 10), "is cut off"),
    ],
    ids=["missing", "truncated"],
)
def test_megatron_file_that_is_missing_or_cut_off_is_named(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Damage, told: str
) -> None:
    there = _megatron(source, tmp_path)
    damage(there / "__1_0.distcp")
    line = _refused(capfd, megatron_to_hf.main, there, tmp_path / "out")
    assert "__1_0.distcp" in line and told in line


def test_megatron_file_with_damaged_contents_is_named_with_its_tensor(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = _megatron(source, tmp_path)
    file = there / "__1_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    line = _refused(capfd, megatron_to_hf.main, there, tmp_path / "out")
    assert "__1_0.distcp" in line and "embedding.word_embeddings.weight" in line


def test_index_that_would_run_code_is_refused_and_runs_none(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = _megatron(source, tmp_path)
    (there / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode())
    line = _refused(capfd, megatron_to_hf.main, there, tmp_path / "out")
    assert "os.system" in line and not (tmp_path / "ran").exists()


def test_config_of_another_model_is_refused(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = _megatron(source, tmp_path)
    other = save_tiny("qwen3", tmp_path)
    line = _refused(capfd, megatron_to_hf.main, there, tmp_path / "out", "--hf", other)
    assert "q_layernorm" in line or "config.json implies" in line


# The check of free space is left out, as if the disk filled up afterwards.
_ON_A_FULL_DISK = """
import sys
from megatron_rpp.conversion import to_hf, to_megatron
from checkpoint_tools import hf_to_megatron, megatron_to_hf
to_megatron.require_disk = to_hf.require_disk = lambda out, needed: None
sys.exit(sys.modules["checkpoint_tools." + sys.argv[1]].main(sys.argv[2:]))
"""


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf"])
def test_disk_that_fills_up_ends_the_conversion_and_nothing_is_left(source: Path, tmp_path: Path, tool: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a tmpfs")
    given = f"--hf {source}" if tool == "hf_to_megatron" else f"--megatron {_megatron(source, tmp_path)}"
    script = tmp_path / "convert.py"
    script.write_text(_ON_A_FULL_DISK)
    # 100 kB: the weights are 160 kB. What is left is listed inside, where the disk is mounted.
    command = (
        f"mount -t tmpfs -o size=100k none {disk} && {{ {sys.executable} {script} {tool} {given} --out {disk}/out; "
    )
    command += f"code=$?; ls -A {disk}; exit $code; }}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"{tool}: error: ") and "No space left on device" in line and "out.partial/" in line
