"""Predicted checksums: the bytes that are hashed, what is held meanwhile, and how a wrong server is reported."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantize
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.weight_sync.checksum_report import differences, sampled_out
from megatron_rpp.weight_sync.checksums import Digests, ExpectedChecksums, merge
from megatron_rpp.weight_sync.gpu_hash import GpuHash
from tests.support.tiny_models import save_tiny

Tensors = dict[str, Tensor]
LAYER = "model.layers.0."


def sha(*parts: Tensor) -> str:
    """As SGLang's tensor_hash on CPU: 8 bytes of the SHA-256 of the joined tensor."""
    joined = torch.cat(parts).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(joined.tolist())).hexdigest()[:16]


def gpu_hash(*parts: Tensor) -> str:
    whole = GpuHash()
    whole.update(torch.cat(parts))
    return f"{whole.finish():016x}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, out) for family in ("llama", "gemma2", "deepseek_v3")}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> HFConfig:
    return read_hf_config(str(folders["llama"]))


@pytest.fixture(scope="module")
def deepseek(folders: dict[str, Path]) -> HFConfig:
    return read_hf_config(str(folders["deepseek_v3"]))


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def predicted(hf: HFConfig, tensors: Tensors, *tp_sizes: int, **settings: Any) -> Digests:
    expected = ExpectedChecksums(hf, tp_sizes or [1], **settings)
    for name, tensor in tensors.items():
        expected.add(name, tensor)
    return expected.result()


def reported(digests: list[dict[str, str]], **placement: int) -> list[dict[str, Any]]:
    """As a server would answer that holds just what was predicted."""
    info = {"dp_size": 1, "pp_size": 1} | placement
    return [{"checksums": dict(d), "parallelism_info": [{**info, "tp_rank": r}]} for r, d in enumerate(digests)]


def test_merged_parameters_are_hashed_as_the_joined_tensor_of_each_rank(llama: HFConfig) -> None:
    q, k, v = torch.randn(32, 4), torch.randn(16, 4), torch.randn(16, 4)
    attention = {f"{LAYER}self_attn.{name}_proj.weight": t for name, t in zip("qkv", (q, k, v), strict=True)}
    o = torch.randn(4, 32)
    result = predicted(llama, attention | {f"{LAYER}self_attn.o_proj.weight": o}, 1, 2)
    qkv_name, o_name = f"{LAYER}self_attn.qkv_proj.weight", f"{LAYER}self_attn.o_proj.weight"
    assert result[1] == [{qkv_name: sha(q, k, v), o_name: sha(o)}]
    assert result[2] == [
        {qkv_name: sha(q[:16], k[:8], v[:8]), o_name: sha(o[:, :16])},
        {qkv_name: sha(q[16:], k[8:], v[8:]), o_name: sha(o[:, 16:])},
    ]


def test_experts_are_hashed_by_index_in_whatever_order_they_come(deepseek: HFConfig, folders: dict[str, Path]) -> None:
    tensors = tensors_of(folders["deepseek_v3"])
    assert predicted(deepseek, dict(reversed(tensors.items())), 1, 2) == predicted(deepseek, tensors, 1, 2)


def test_a_part_that_came_in_its_turn_is_let_go_and_an_early_one_is_kept(deepseek: HFConfig) -> None:
    expected = ExpectedChecksums(deepseek, [2])
    experts = "model.layers.1.mlp.experts"
    in_turn, early = torch.randn(20, 32), torch.randn(20, 32)
    held, kept = weakref.ref(in_turn), weakref.ref(early)
    expected.add(f"{experts}.0.gate_proj.weight", in_turn)
    expected.add(f"{experts}.1.gate_proj.weight", early)
    del in_turn, early
    assert held() is None
    assert kept() is not None
    expected.add(f"{experts}.0.up_proj.weight", torch.randn(20, 32))
    assert kept() is None


def test_views_of_live_parameters_are_hashed_and_not_changed(llama: HFConfig) -> None:
    live = torch.nn.Parameter(torch.randn(4, 32))
    before = live.detach().clone()
    result = predicted(llama, {f"{LAYER}self_attn.o_proj.weight": live.t().contiguous().t()}, 1)
    assert result[1][0] == {f"{LAYER}self_attn.o_proj.weight": sha(before)}
    assert torch.equal(live, before)


def test_what_sglang_derives_for_gemma2_is_predicted(folders: dict[str, Path]) -> None:
    hf, tensors = read_hf_config(str(folders["gemma2"])), tensors_of(folders["gemma2"])
    digests = predicted(hf, {n: t.bfloat16() for n, t in tensors.items()})[1][0]
    assert digests["model.normalizer"] == sha(torch.tensor([32**0.5]).bfloat16())
    assert digests["model.norm.gemma_weight"] == sha(tensors["model.norm.weight"].bfloat16() + 1)


def test_a_parameter_without_all_of_its_parts_is_an_error_that_names_them(llama: HFConfig) -> None:
    with pytest.raises(
        ValueError, match=r"sent 1 of the 2 parts of .*gate_up_proj.weight.*gate_proj.*up_proj.*; came: "
    ):
        predicted(llama, {f"{LAYER}mlp.gate_proj.weight": torch.randn(48, 4)})


def test_a_tensor_that_comes_twice_is_an_error(llama: HFConfig) -> None:
    expected = ExpectedChecksums(llama, [1])
    expected.add(f"{LAYER}mlp.gate_proj.weight", torch.randn(48, 4))
    with pytest.raises(ValueError, match="came twice"):
        expected.add(f"{LAYER}mlp.gate_proj.weight", torch.randn(48, 4))
    expected.add("model.norm.weight", torch.randn(4))
    with pytest.raises(ValueError, match="came again"):
        expected.add("model.norm.weight", torch.randn(4))


def test_gpu_servers_hash_joined_parts_in_their_own_way(llama: HFConfig) -> None:
    q, k, v = torch.randn(32, 4), torch.randn(16, 4), torch.randn(16, 4)
    attention = {f"{LAYER}self_attn.{name}_proj.weight": t for name, t in zip("qkv", (q, k, v), strict=True)}
    of_gpu = predicted(llama, attention, 1, 2, device="cuda")
    name = f"{LAYER}self_attn.qkv_proj.weight"
    assert of_gpu[1] == [{name: gpu_hash(q, k, v)}]
    assert of_gpu[2] == [{name: gpu_hash(q[:16], k[:8], v[:8])}, {name: gpu_hash(q[16:], k[8:], v[8:])}]
    assert of_gpu != predicted(llama, attention, 1, 2)


def sglang_dequantize() -> Any:
    """SGLang's own block_quant_dequant, without the imports of its module, which need a GPU's packages."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "srt/layers/quantization/fp8_utils.py").read_text()
    wanted = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "block_quant_dequant"]
    scope: dict[str, Any] = {"torch": torch, "List": list}
    exec(compile(ast.Module(wanted, []), "block_quant_dequant", "exec"), scope)
    return scope["block_quant_dequant"]


def test_fp8_weights_are_hashed_as_sglang_dequantizes_them(llama: HFConfig) -> None:
    torch.manual_seed(0)
    w8, scale = quantize(torch.randn(200, 384) * torch.logspace(-12, 4, 384))
    assert torch.equal(dequantize(w8, scale), sglang_dequantize()(w8, scale, [128, 128], torch.bfloat16))
    name = f"{LAYER}mlp.down_proj.weight"
    both = {name: w8, f"{name}_scale_inv": scale}
    in_bfloat16 = predicted(llama, {name: dequantize(w8, scale)})
    assert predicted(llama, both) == predicted(llama, dict(reversed(both.items()))) == in_bfloat16
    with pytest.raises(ValueError, match="only one came"):
        predicted(llama, {name: w8})
    with pytest.raises(ValueError, match="has 100 columns"):
        w8, scale = quantize(torch.randn(10, 100))
        predicted(llama, {name: w8, f"{name}_scale_inv": scale})


def test_a_flipped_bit_of_any_tensor_is_reported_with_its_parameter_and_names(
    deepseek: HFConfig, folders: dict[str, Path]
) -> None:
    tensors = tensors_of(folders["deepseek_v3"])
    right = predicted(deepseek, tensors)[1]
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[-4] ^= 1  # the lowest bit of the last value
        (line,) = differences(right, reported(predicted(deepseek, tensors | {name: changed})[1]))
        general = ".".join("*" if part.isdigit() and i > 2 else part for i, part in enumerate(name.split(".")))
        assert "is not the trainer's" in line
        assert general in line.partition("made of ")[2]


def test_every_kind_of_difference_is_reported_with_its_rank() -> None:
    ours = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}]
    theirs = [{"a": "1", "b": "2"}, {"b": "3", "c": "4"}]
    assert differences(ours, reported(theirs)[::-1]) == [
        "a on TP rank 1: missing on the server; made of a",
        "b on TP rank 1: the server's 3 is not the trainer's 2; made of b",
        "c on TP rank 1: not sent by the trainer; made of c",
    ]
    assert differences(ours, reported(theirs), skip=["a", "b", "c"]) == []
    assert differences(ours, reported(ours)) == []


def test_shared_experts_that_a_server_fused_are_reported_with_the_remedy() -> None:
    (line,) = differences([{"model.layers.1.mlp.shared_experts.down_proj.weight": "1"}], reported([{}]))
    assert line.endswith("start the server with --disable-shared-experts-fusion")


def test_a_server_of_another_shape_is_refused_before_tensors_are_compared() -> None:
    ours = [{"a": "1"}, {"a": "1"}]
    first, _ = reported(ours)
    for answer, ranks in (([first], r"\[0\]"), ([first, first], r"\[0, 0\]")):
        (line,) = differences(ours, answer)
        assert re.fullmatch(rf"the server reported .* TP ranks {ranks}; they should be of ranks 0 to 1", line)


def test_stages_merge_to_the_whole_model_and_must_agree(llama: HFConfig, folders: dict[str, Path]) -> None:
    tensors = tensors_of(folders["llama"])
    late = {name: t for name, t in tensors.items() if ".layers.3." in name or name == "lm_head.weight"}
    early = {name: t for name, t in tensors.items() if name not in late}
    stages = [predicted(llama, part, 1, 2) for part in (early, late)]
    assert merge(stages) == predicted(llama, tensors, 1, 2)
    with pytest.raises(ValueError, match=r"different weights of lm_head\.weight"):
        merge([stages[1], predicted(llama, {"lm_head.weight": torch.zeros(19, 32)}, 1, 2)])


@pytest.mark.parametrize("num_layers", [1, 2, 7, 8, 12, 61])
def test_samples_of_eight_versions_cover_every_layer_and_none_is_empty(num_layers: int) -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(num_layers)]
    covered: set[str] = set()
    for version in range(100, 108):
        skip = sampled_out(num_layers, version)
        checked = {name for name in names if not any(part in name for part in skip)}
        assert 1 <= len(checked) <= -(-num_layers // 8)
        assert not any(part in "model.norm.weight" for part in skip)
        covered |= checked
    assert covered == set(names)


def test_skipped_tensors_are_neither_hashed_nor_awaited(llama: HFConfig) -> None:
    tensors = {f"{LAYER}mlp.gate_proj.weight": torch.randn(48, 4), "model.norm.weight": torch.randn(4)}
    assert list(predicted(llama, tensors, skip=[".layers.0."])[1][0]) == ["model.norm.weight"]
