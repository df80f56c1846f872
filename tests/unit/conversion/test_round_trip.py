"""Hugging Face -> Megatron -> Hugging Face, every family; casts, FP8, files, and what compare and inspect tell."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_tools import compare, hf_to_megatron, inspect, megatron_to_hf
from megatron_rpp.conversion import megatron_writer, skeleton
from megatron_rpp.model.hf_io.fp8_blocks import quantize
from megatron_rpp.model.load_megatron import read_metadata
from tests.support.tiny_models import FAMILY_NAMES, save_tiny


def _there_and_back(source: Path, *to_hf: str, to_megatron: tuple[str, ...] = ()) -> Path:
    there, back = source.with_name("there"), source.with_name("back")
    assert hf_to_megatron.main(["--hf", str(source), "--out", str(there), *to_megatron]) == 0
    assert megatron_to_hf.main(["--megatron", str(there), "--out", str(back), *to_hf]) == 0
    return back


def _as_bfloat16(source: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_round_trip_gives_every_tensor_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = save_tiny(family, tmp_path)
    back = _there_and_back(source, to_megatron=("--tp", "2"))
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_bfloat16_stays_bfloat16_and_transformers_loads_the_export_in_several_files(tmp_path: Path) -> None:
    source = save_tiny("qwen3", tmp_path)
    _as_bfloat16(source)
    back = _there_and_back(source, "--shard-gb", "0.00003")
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (back, source))
    assert ours.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dtype_casts_in_either_direction(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path)
    back = _there_and_back(source, "--dtype", "float32", to_megatron=("--dtype", "bfloat16"))
    after = load_file(back / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(after[name], tensor.bfloat16().float()), name
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "there" / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp8_export_holds_quantized_projections_and_converts_again(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path)
    _as_bfloat16(source)
    back = _there_and_back(source, "--fp8", "--shard-gb", "0.000002")  # a weight and its scales in two files
    config = json.loads((back / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    name = "model.layers.1.mlp.down_proj.weight"
    held = {k: v for file in back.glob("*.safetensors") for k, v in load_file(file).items()}
    weight, scale = quantize(load_file(source / "model.safetensors")[name])
    assert torch.equal(held[name].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(held[f"{name}_scale_inv"], scale)
    assert held["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert hf_to_megatron.main(["--hf", str(back), "--out", str(tmp_path / "again")]) == 0
    assert compare.main([str(back), str(tmp_path / "again")]) == 0, "both are read dequantized"
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("has_scales", [True, False])
def test_fp8_scales_in_a_megatron_directory_are_passed_over_and_may_be_absent(
    tmp_path: Path, has_scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's `_extra_state` entries, which a run in FP8 saves beside the weights."""
    scales = io.BytesIO()
    torch.save([torch.randint(0, 256, (300,), dtype=torch.uint8)], scales)
    monkeypatch.setattr(megatron_writer, "_no_object", scales.getvalue)
    if not has_scales:
        monkeypatch.setattr(skeleton, "_object_keys", lambda state: [])
    source = save_tiny("llama", tmp_path)
    back = _there_and_back(source)
    stored = read_metadata(tmp_path / "there").state_dict_metadata
    assert any("_extra_state" in key for key in stored) == has_scales
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_sidecars_travel_and_indices_do_not(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path)
    texts = {"tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "merges.txt": "a b", "metadata.json": "x"}
    for name, text in texts.items():
        (source / name).write_text(text)
    back = _there_and_back(source)
    for name in ("tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        assert (back / name).read_text() == texts[name]
    assert not (back / "metadata.json").exists()


def test_compare_finds_a_changed_a_missing_and_a_recast_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = save_tiny("llama", tmp_path), save_tiny("llama", tmp_path / "other")
    assert compare.main([str(source), str(other)]) == 0
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.25
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].double()
    tensors["lm_head.weight"][0, 0] *= -0.0
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors")
    capsys.readouterr()
    assert compare.main([str(source), str(other)]) == 1
    told = capsys.readouterr().out
    assert "model.norm.weight: 1 of 32 values differ, by at most 2.500e-01" in told
    assert "model.layers.0.input_layernorm.weight: float32 and float64" in told
    assert "model.layers.3.mlp.up_proj.weight: missing in the second" in told
    assert "lm_head.weight: 1 of" in told
    tensors["model.layers.3.mlp.up_proj.weight"] = load_file(source / "model.safetensors")[
        "model.layers.3.mlp.up_proj.weight"
    ]
    tensors["lm_head.weight"] = load_file(source / "model.safetensors")["lm_head.weight"]
    save_file(tensors, other / "model.safetensors")
    assert compare.main([str(source), str(other), "--atol", "0.26"]) == 0
    assert compare.main([str(source), str(tmp_path / "nowhere")]) == 2


def test_compare_tells_negative_zero_from_zero_and_takes_equal_nans_for_equal(tmp_path: Path) -> None:
    name, folders = "model.norm.weight", [save_tiny("llama", tmp_path / which) for which in ("first", "second")]

    def rewrite(folder: Path, *values: float) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name][: len(values)] = torch.tensor(values)
        save_file(tensors, folder / "model.safetensors")

    first, second = map(str, folders)
    for folder in folders:
        rewrite(folder, 0.0, float("nan"))
    assert compare.main([first, second]) == 0 == compare.main([first, second, "--atol", "0"])
    rewrite(folders[1], -0.0)
    assert compare.main([first, second]) == 1
    assert compare.main([first, second, "--atol", "0"]) == 0
    rewrite(folders[1], 0.0, 1.0)
    assert compare.main([first, second, "--atol", "1e9"]) == 1, "NaN is near nothing but NaN"


@pytest.mark.parametrize("atol", ["nan", "inf", "-1"])
def test_a_tolerance_that_would_accept_everything_is_refused(atol: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path), str(tmp_path), "--atol", atol])
    assert ended.value.code == 2


def test_inspect_tells_the_same_of_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there = save_tiny("qwen3", tmp_path), tmp_path / "there"
    assert hf_to_megatron.main(["--hf", str(source), "--out", str(there)]) == 0
    capsys.readouterr()
    told = []
    for path in (source, there):
        assert inspect.main([str(path), "--tensors"]) == 0
        told.append(capsys.readouterr().out)
    count = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    for text in told:
        for line in ("Qwen3ForCausalLM", f"{count:,} in", "float32", "fp8           no", "tied          yes"):
            assert line in text
    assert "decoder.layers.mlp.linear_fc1.weight  float32  [4, 96, 32]" in told[1]
