"""Reading a Hugging Face directory: what a tensor costs, FP8, pickles, and what is refused by file and tensor."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantization_config, quantize
from megatron_rpp.model.hf_io.safetensors_writer import Entry, write_file
from megatron_rpp.model.hf_io.tensors import HFTensors

WEIGHT = "model.layers.0.mlp.up_proj.weight"
SCALE = WEIGHT + "_scale_inv"


def write_shards(folder: Path, **file_of: Any) -> None:
    """Two files, x with a = ones(2) and y with b = zeros(300), and an index."""
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    save_file({"b": torch.zeros(300)}, folder / "y.safetensors")
    write_index(folder, {"a": "x.safetensors", "b": "y.safetensors", **file_of})


def write_index(folder: Path, file_of: dict[str, Any], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"weight_map": file_of}))


def write_config(folder: Path, quantization: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def resident_file_bytes() -> int:
    """Pages of files that this process has in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    assert torch.equal(tensors.read("a"), torch.ones(2)) and torch.equal(tensors.read("b"), torch.zeros(300))
    assert tensors.names == ("a", "b") and (tensors.file_of("a"), tensors.file_of("b")) == (
        "x.safetensors",
        "y.safetensors",
    )


def test_shape_dtype_and_bytes_are_those_of_what_is_read(tmp_path: Path) -> None:
    saved = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(0, 4).long()}
    save_file(saved, tmp_path / "model.safetensors")
    tensors = HFTensors(str(tmp_path))
    for name, tensor in saved.items():
        read = tensors.read(name)
        assert torch.equal(read, tensor) and tensors.stored_dtype(name) == tensor.dtype
        assert (tensors.shape(name), tensors.dtype(name), tensors.nbytes(name)) == (
            tuple(read.shape),
            read.dtype,
            read.nbytes,
        )


def test_a_name_that_is_not_there_is_an_error_that_gives_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    for method in (tensors.read, tensors.shape, tensors.dtype, tensors.stored_dtype, tensors.nbytes, tensors.file_of):
        with pytest.raises(ValueError, match=f"{tmp_path} lacks the tensor c"):
            method("c")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident pages are counted on Linux")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_slice_costs_its_own_pages_and_a_freed_tensor_none(tmp_path: Path, pickled: bool) -> None:
    """Loading holds one tensor at a time: resident memory must not grow with the checkpoint."""
    size = 32 << 20
    saved = {str(i): torch.full((size // 4,), float(i)) for i in range(3)}
    if pickled:
        torch.save(saved, tmp_path / "pytorch_model.bin")
    else:
        save_file(saved, tmp_path / "model.safetensors")
    del saved
    tensors, before = HFTensors(str(tmp_path), allow_pickle=pickled), resident_file_bytes()
    for i in range(3):
        tensor = tensors.read(str(i))
        part = tensor[1000:2000]
        assert part.sum() == 1000.0 * i and resident_file_bytes() - before < size // 4
        assert tensor.sum() == size // 4 * i and resident_file_bytes() - before > size // 2
        del tensor, part
        assert resident_file_bytes() - before < size // 4


def test_writing_to_a_tensor_that_was_read_changes_neither_file_nor_later_reads(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    tensors.read("a").fill_(7.0)
    assert torch.equal(tensors.read("a"), torch.ones(2))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))


def test_tensors_that_another_writer_left_unaligned_are_read(tmp_path: Path) -> None:
    entries = [Entry("a", torch.uint8, (3,)), Entry("b", torch.float64, (2,))]
    write_file(
        tmp_path / "model.safetensors",
        entries,
        [("a", torch.ones(3, dtype=torch.uint8)), ("b", torch.tensor([0.5, 2.0]).double())],
    )
    assert HFTensors(str(tmp_path)).read("b").tolist() == [0.5, 2.0]


def test_a_hub_cache_whose_files_are_links_to_blobs_is_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_shards(tmp_path / "blobs")
    for i, file in enumerate((tmp_path / "blobs").iterdir()):
        file.rename(tmp_path / "blobs" / str(i))
        os.symlink(f"../blobs/{i}", tmp_path / "snapshot" / file.name)
    assert torch.equal(HFTensors(str(tmp_path / "snapshot")).read("a"), torch.ones(2))


def test_a_directory_without_a_model_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no model\.safetensors"):
        HFTensors(str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/no is not a directory"):
        HFTensors(str(tmp_path / "no"))


@pytest.mark.parametrize("size", [0, 4, 200])
def test_a_file_cut_in_its_header_is_an_error_that_names_it(tmp_path: Path, size: int) -> None:
    save_file({"b": torch.zeros(300), "c" * 300: torch.zeros(1)}, tmp_path / "model.safetensors")
    truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(ValueError, match=rf"{tmp_path}/model\.safetensors is damaged: {size} bytes"):
        HFTensors(str(tmp_path))


def test_a_shard_cut_in_its_data_is_an_error_at_opening_that_names_file_and_first_cut_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"b": torch.zeros(300), "c": torch.zeros(2), "d": torch.zeros(2)}, tmp_path / "y.safetensors")
    truncate(tmp_path / "y.safetensors", os.path.getsize(tmp_path / "y.safetensors") - 12)
    with pytest.raises(ValueError, match=rf"{tmp_path}/y\.safetensors is damaged: it is cut off in the tensor c"):
        HFTensors(str(tmp_path))


def test_a_git_lfs_pointer_is_told_from_damage(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer, not the file; run git lfs pull"):
        HFTensors(str(tmp_path))


def test_a_file_that_shrinks_after_opening_is_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    truncate(tmp_path / "y.safetensors", 500)
    assert torch.equal(tensors.read("a"), torch.ones(2))
    with pytest.raises(ValueError, match=rf"{tmp_path}/y\.safetensors: cannot read the tensor b"):
        tensors.read("b")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "a, F32 .3., is given 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "a starts at byte"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "4 bytes follow its last tensor"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "nothing usable of a"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "nothing usable of a"),
        ({"dtype": "F32", "shape": [2]}, "nothing usable of a"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "nothing usable of a"),
        ([], "nothing usable of a"),
        ({"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}, "a is stored as F4; convert it"),
    ],
)
def test_a_header_that_contradicts_its_file_is_an_error(tmp_path: Path, entry: Any, match: str) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=rf"{tmp_path}/model\.safetensors.*{match}"):
        HFTensors(str(tmp_path))


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_a_value_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of the header change, or the file is cut, or grows."""
    save_file({"a": torch.ones(2), "b": torch.zeros(3, 2).bfloat16()}, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 21))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (tmp_path / "model.safetensors").write_bytes(content + data.draw(st.binary(max_size=3)))
    try:
        tensors = HFTensors(str(tmp_path))
    except ValueError as error:
        assert "model.safetensors" in str(error)
    else:
        assert all(tensors.read(name).nbytes == tensors.nbytes(name) for name in tensors.names)


def test_a_tensor_that_its_shard_does_not_hold_is_an_error_that_names_both(tmp_path: Path) -> None:
    write_shards(tmp_path, b="x.safetensors")
    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.safetensors lacks the tensor b"):
        HFTensors(str(tmp_path))
    write_shards(tmp_path, c="x.safetensors")
    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.safetensors lacks the tensor c"):
        HFTensors(str(tmp_path))


def test_a_tensor_in_two_files_is_an_error_that_names_them(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.zeros(300)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=rf"a is in {tmp_path}/x\.safetensors and in {tmp_path}/y\.safetensors"):
        HFTensors(str(tmp_path))


def test_a_missing_shard_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}/y\.safetensors is missing"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "."])
def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path: Path, file: str) -> None:
    write_shards(tmp_path, b=file)
    with pytest.raises(ValueError, match="only files in the same directory are read"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100000])
def test_a_malformed_index_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        HFTensors(str(tmp_path))


def test_tensors_that_the_model_lacks_are_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = HFTensors(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds 1 tensors .*\(b in y\.safetensors\); check num_hidden_layers"):
        tensors.require_no_others(["a"])
    tensors.require_no_others(["a", "b", "c", "absent"])


def test_the_rotary_buffer_of_old_checkpoints_is_no_surplus(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({"a": torch.ones(1), name: torch.ones(1)}, tmp_path / "model.safetensors")
    HFTensors(str(tmp_path)).require_no_others(["a"])


def save_fp8(folder: Path, **changed: Tensor) -> dict[str, Tensor]:
    """A weight [200, 300] in FP8 blocks beside a plain tensor."""
    w8, scales = quantize(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    saved = {"plain": torch.ones(3), WEIGHT: w8, SCALE: scales, **changed}
    save_file(saved, folder / "model.safetensors")
    return saved


def test_fp8_weights_are_read_in_bfloat16_and_their_scales_have_no_names(tmp_path: Path) -> None:
    saved = save_fp8(tmp_path)
    tensors = HFTensors(str(tmp_path))
    read = tensors.read(WEIGHT)
    assert tensors.names == (WEIGHT, "plain")
    assert torch.equal(read, dequantize(saved[WEIGHT], saved[SCALE])) and read.dtype == torch.bfloat16
    assert (tensors.dtype(WEIGHT), tensors.stored_dtype(WEIGHT)) == (torch.bfloat16, torch.float8_e4m3fn)
    assert (tensors.shape(WEIGHT), tensors.nbytes(WEIGHT)) == ((200, 300), read.nbytes)
    tensors.require_no_others([WEIGHT, "plain"])


def test_fp8_weights_can_be_read_in_another_dtype(tmp_path: Path) -> None:
    saved = save_fp8(tmp_path)
    tensors = HFTensors(str(tmp_path), dequantized_dtype=torch.float32)
    assert torch.equal(tensors.read(WEIGHT), dequantize(saved[WEIGHT], saved[SCALE], torch.float32))
    assert tensors.dtype(WEIGHT) == torch.float32


def test_the_scales_may_be_in_another_file_and_in_bfloat16(tmp_path: Path) -> None:
    """As in Qwen3's FP8 releases."""
    w8, scales = quantize(torch.ones(200, 300))
    save_file({WEIGHT: w8}, tmp_path / "x.safetensors")
    save_file({SCALE: scales.bfloat16()}, tmp_path / "y.safetensors")
    write_index(tmp_path, {WEIGHT: "x.safetensors", SCALE: "y.safetensors"})
    assert torch.equal(HFTensors(str(tmp_path)).read(WEIGHT), dequantize(w8, scales.bfloat16()))


def test_the_block_size_is_that_of_the_configuration(tmp_path: Path) -> None:
    saved = save_fp8(tmp_path, **{SCALE: torch.rand(4, 2)})
    write_config(tmp_path, {**quantization_config(), "weight_block_size": [64, 256]})
    expected = dequantize(saved[WEIGHT], saved[SCALE], block=(64, 256))
    assert torch.equal(HFTensors(str(tmp_path)).read(WEIGHT), expected)


@pytest.mark.parametrize("scale", [torch.ones(2, 2), torch.tensor(1.0), torch.ones(2, 3).int(), torch.ones(6)])
def test_scales_that_do_not_fit_are_an_error_that_names_both(tmp_path: Path, scale: Tensor) -> None:
    save_fp8(tmp_path, **{SCALE: scale})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {SCALE} .* does not scale {WEIGHT} \(200, 300\)"):
        HFTensors(str(tmp_path))


def test_an_fp8_weight_without_scales_is_an_error_that_names_both(tmp_path: Path) -> None:
    save_file({WEIGHT: torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {WEIGHT} is FP8, .* lacks its scales {SCALE}"):
        HFTensors(str(tmp_path))


def test_scales_of_a_weight_that_is_not_fp8_are_surplus(tmp_path: Path) -> None:
    save_fp8(tmp_path, **{WEIGHT: torch.ones(200, 300)})
    with pytest.raises(ValueError, match=SCALE):
        HFTensors(str(tmp_path)).require_no_others([WEIGHT, "plain"])


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq' cannot be read"),
        ({"quant_method": "awq"}, "quantized by 'awq' cannot be read"),
        ({"quant_method": "fp8", "weight_block_size": None}, "FP8 with one scale a tensor"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\] must be two positive"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "must be two positive"),
        ({"bits": 4}, "quantized by None cannot be read"),
        ("fp4", "quantized by 'fp4' cannot be read"),
    ],
)
def test_another_quantization_is_refused_by_its_name(tmp_path: Path, quantization: Any, match: str) -> None:
    save_fp8(tmp_path)
    write_config(tmp_path, quantization)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{match}"):
        HFTensors(str(tmp_path))


def test_a_configuration_of_compressed_tensors_is_refused_under_its_older_key_too(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"compression_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(ValueError, match="quantized by 'compressed-tensors' cannot be read"):
        HFTensors(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "3"])
def test_a_malformed_configuration_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json is not a model's configuration"):
        HFTensors(str(tmp_path))


def test_a_configuration_without_quantization_changes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for quantization in (None, quantization_config()):
        write_config(tmp_path, quantization)
        assert torch.equal(HFTensors(str(tmp_path)).read("a"), torch.ones(2))


def test_pickles_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds pickles .*pass --allow-pickle"):
        HFTensors(str(tmp_path))
    tensors = HFTensors(str(tmp_path), allow_pickle=True)
    assert torch.equal(tensors.read("a"), torch.ones(2)) and tensors.names == ("a",)
    assert (tensors.shape("a"), tensors.dtype("a"), tensors.nbytes("a")) == ((2,), torch.float32, 8)


def test_sharded_pickles_are_read_through_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    torch.save({"b": torch.nn.Parameter(torch.zeros(3))}, tmp_path / "y.bin")
    write_index(tmp_path, {"a": "x.bin", "b": "y.bin"}, "pytorch_model.bin.index.json")
    tensors = HFTensors(str(tmp_path), allow_pickle=True)
    assert torch.equal(tensors.read("b"), torch.zeros(3)) and not tensors.read("b").requires_grad
    assert tensors.file_of("b") == "y.bin"


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert HFTensors(str(tmp_path), allow_pickle=True).names == ("b",)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    value, path = {"a": Trap(str(tmp_path / "sprung"))}, tmp_path / "pytorch_model.bin"
    if zipped:
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=rf"{path} cannot be read as a checkpoint of weights alone"):
        HFTensors(str(tmp_path), allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("value", "match"), [({"a": torch.ones(1), "step": 3}, "step is a int"), ([torch.ones(1)], "holds a list")]
)
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, value: Any, match: str) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.*{match}"):
        HFTensors(str(tmp_path), allow_pickle=True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_pickle_is_a_value_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    try:
        tensors = HFTensors(str(tmp_path), allow_pickle=True)
        assert all(tensors.read(name).clone().nbytes == tensors.nbytes(name) for name in tensors.names)
    except ValueError as error:
        assert "pytorch_model.bin" in str(error)
