"""Which server parameter each Hugging Face tensor is a part of, and how TP cuts it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.weight_sync.server_cuts import Axis, Cutter
from megatron_rpp.weight_sync.server_layout import ServerLayout, made_of
from tests.support.tiny_models import FAMILY_NAMES, save_tiny

ON_SERVERS = tuple(name for name in FAMILY_NAMES if name != "glm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, out) for family in FAMILY_NAMES}


@pytest.fixture
def llama(models: dict[str, Path]) -> HFConfig:
    """4 heads of 8 in 2 groups, 19 tokens."""
    return read_hf_config(str(models["llama"]))


def shares(hf: HFConfig, tp_size: int, device: str, tensor: Tensor, axis: Axis, dim: int = 0) -> list[list[int]]:
    return [torch.cat(pieces).tolist() for pieces in Cutter(hf, tp_size, device).shares(tensor, axis, dim)]


@pytest.mark.parametrize("family", ON_SERVERS)
def test_no_place_of_a_server_parameter_is_empty_or_taken_twice(family: str, models: dict[str, Path]) -> None:
    layout, places, counts = ServerLayout(read_hf_config(str(models[family]))), defaultdict(list), {}
    for name in load_file(models[family] / "model.safetensors"):
        for part in layout.parts(name):
            places[part.parameter].append(part.index)
            assert counts.setdefault(part.parameter, part.count) == part.count
    assert {parameter: sorted(found) for parameter, found in places.items()} == {
        parameter: list(range(count)) for parameter, count in counts.items()
    }


@pytest.mark.parametrize("family", [name for name in ON_SERVERS if name != "glm4"])
def test_a_report_names_the_tensors_that_a_parameter_is_made_of(family: str, models: dict[str, Path]) -> None:
    """GLM-4 holds gate and up as one tensor, which the server's name does not tell."""
    layout = ServerLayout(read_hf_config(str(models[family])))
    for name in load_file(models[family] / "model.safetensors"):
        for part in layout.parts(name):
            assert [pattern for pattern in made_of(part.parameter) if fnmatch(name, pattern)], (name, part.parameter)


def test_a_family_without_a_class_in_sglang_is_refused_with_the_key_to_set(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"GlmForCausalLM .* set weight_sync\.verify=off"):
        ServerLayout(read_hf_config(str(models["glm"])))


def test_what_a_server_does_not_hold_has_no_parts(llama: HFConfig) -> None:
    with_mtp, tied = ServerLayout(replace(llama, num_mtp_layers=1)), ServerLayout(replace(llama, tied_embeddings=True))
    assert with_mtp.parts("model.layers.4.eh_proj.weight") == ()
    assert with_mtp.parts("model.layers.3.mlp.gate_proj.weight") != ()
    assert tied.parts("lm_head.weight") == ()
    assert ServerLayout(llama).parts("lm_head.weight") != ()


def test_gpu_servers_of_more_ranks_than_key_heads_repeat_heads(llama: HFConfig) -> None:
    keys = torch.arange(2)  # heads of one element
    assert shares(llama, 4, "cuda", keys, Axis.KV_HEADS) == [[0], [0], [1], [1]]
    assert shares(llama, 4, "cuda", torch.arange(4), Axis.HEADS) == [[0], [1], [2], [3]]
    assert shares(llama, 1, "cuda", keys, Axis.KV_HEADS) == [[0, 1]]


def test_cpu_servers_pad_heads_and_widths_with_zeros(llama: HFConfig) -> None:
    assert shares(llama, 3, "cpu", torch.arange(1, 3), Axis.KV_HEADS) == [[1], [2], [0]]
    assert shares(llama, 3, "cpu", torch.arange(1, 5), Axis.HEADS) == [[1, 2], [3, 4], [0, 0]]
    width = torch.arange(1, 49)  # to 64: 32 a rank
    assert shares(llama, 2, "cpu", width, Axis.FFN) == [list(range(1, 33)), [*range(33, 49), *[0] * 16]]
    assert shares(llama, 2, "cuda", width, Axis.FFN) == [list(range(1, 25)), list(range(25, 49))]
    columns = torch.arange(1, 5)[None]  # [1, 4], cut along the columns
    assert shares(llama, 3, "cpu", columns, Axis.HEADS, 1) == [[[1, 2]], [[3, 4]], [[0, 0]]]


def test_shared_experts_are_padded_one_by_one(models: dict[str, Path]) -> None:
    hf = read_hf_config(str(models["deepseek_v3"]))  # 2 of width 20: to 32 each
    (whole,) = shares(hf, 1, "cpu", torch.arange(1, 41), Axis.SHARED_FFN)
    assert whole == [*range(1, 41), *[0] * 24]


@pytest.mark.parametrize(("tp_size", "rows"), [(1, 64), (2, 32), (3, 64), (6, 64), (128, 64)])
def test_the_vocabulary_is_padded_to_64_or_to_64_a_rank(tp_size: int, rows: int, llama: HFConfig) -> None:
    """SGLang pads to a multiple of 64, and of 64 x TP where TP does not divide that."""
    own = shares(llama, tp_size, "cuda", torch.arange(1, 20), Axis.VOCABULARY)
    assert [len(share) for share in own] == [rows] * tp_size
    assert [token for share in own for token in share] == [*range(1, 20), *[0] * (tp_size * rows - 19)]


@pytest.mark.parametrize(
    ("axis", "length", "complaint"), [(Axis.HEADS, 32, "num_attention_heads=4"), (Axis.FFN, 49, "=49")]
)
def test_what_gpu_servers_cannot_divide_is_refused(axis: Axis, length: int, complaint: str, llama: HFConfig) -> None:
    with pytest.raises(
        ValueError, match=f"{complaint} .* tensor-parallel size 3; choose another rollout.server_tensor"
    ):
        shares(llama, 3, "cuda", torch.arange(length), axis)
