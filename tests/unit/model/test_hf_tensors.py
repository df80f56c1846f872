"""Reading a Hugging Face directory: whole or in shards, and what is refused by file and tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rpp.model.hf_tensors import HFTensors


def write_shards(folder: Path, **file_of: str) -> None:
    """Two files, x with a = ones(2) and y with b = zeros(300), and an index."""
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    save_file({"b": torch.zeros(300)}, folder / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "y.safetensors", **file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    assert torch.equal(tensors.read("a"), torch.ones(2)) and torch.equal(tensors.read("b"), torch.zeros(300))


def test_a_directory_without_safetensors_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no model\.safetensors"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("size", [4, 200, 1000])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, size: int) -> None:
    """In the length of the header, in the header, in the data."""
    save_file({"b": torch.zeros(300), "c" * 300: torch.zeros(1)}, tmp_path / "model.safetensors")
    truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(ValueError, match=rf"{tmp_path}/model\.safetensors is damaged"):
        HFTensors(str(tmp_path))


def test_a_truncated_shard_is_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path)
    truncate(tmp_path / "y.safetensors", 500)
    tensors = HFTensors(str(tmp_path))
    assert torch.equal(tensors.read("a"), torch.ones(2))
    with pytest.raises(ValueError, match=rf"{tmp_path}/y\.safetensors: cannot read the tensor b"):
        tensors.read("b")


def test_a_tensor_that_its_shard_does_not_hold_is_an_error_that_names_both(tmp_path: Path) -> None:
    write_shards(tmp_path, b="x.safetensors")
    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.safetensors: cannot read the tensor b"):
        HFTensors(str(tmp_path)).read("b")


def test_a_missing_shard_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}/y\.safetensors is missing"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path: Path, file: str) -> None:
    write_shards(tmp_path, b=file)
    with pytest.raises(ValueError, match="only files in the same directory are read"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_malformed_index_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        HFTensors(str(tmp_path))
