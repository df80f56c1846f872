"""weight_sync.dtype=auto: FP8 where the trainer's blocks are the engine's, by the very tables that export weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig, WeightSyncConfig
from megatron_rpp.model.hf_config import HFConfig, MoE, Rope
from megatron_rpp.model.hf_mapping.transforms import QKV, Direct, GateUp
from megatron_rpp.model.server_weights import kept_layers, server_dtype, server_weights, why_other_values
from megatron_rpp.weight_sync.build import check_weight_sync, export_dtype

HF = HFConfig(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=128,
    vocab_size=32,
    norm_eps=1e-6,
    rope=Rope(1e4),
    max_position_embeddings=64,
    tied_embeddings=False,
)


def config(recipe: str = "blockwise", sync: str = "auto", *, tensor: int = 1, server: int = 1, **fp8: int) -> Config:
    return Config(
        model=ModelConfig(dtype="bfloat16"),
        parallel=ParallelConfig(tensor=tensor),
        rollout=RolloutConfig(server_tensor=server),
        weight_sync=WeightSyncConfig(dtype=sync),
        fp8=Fp8Config(recipe=recipe, **fp8),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("recipe", "sync", "expected"),
    [
        ("none", "auto", "bfloat16"),
        ("none", "float8", "float8"),
        ("blockwise", "auto", "float8"),
        ("blockwise", "bfloat16", "bfloat16"),
        ("blockwise", "float32", "float32"),
        ("delayed", "auto", "bfloat16"),
        ("tensorwise", "auto", "bfloat16"),
        ("mxfp8", "auto", "bfloat16"),
        ("tensorwise", "float8", "float8"),
    ],
)
def test_auto_is_float8_where_the_trainer_quantizes_in_the_servers_blocks(
    recipe: str, sync: str, expected: str
) -> None:
    assert server_dtype(config(recipe, sync), HF) == expected
    converted = {"float8": torch.float8_e4m3fn, "float32": torch.float32, "bfloat16": torch.bfloat16}[expected]
    is_as_it_is = sync == "auto" and expected != "float8"
    assert export_dtype(config(recipe, sync), HF) == (None if is_as_it_is else converted)


@pytest.mark.parametrize(
    ("hf", "tensor", "server", "reason"),
    [
        (HF, 4, 4, None),
        (replace(HF, head_dim=64), 1, 1, "head_dim=64"),
        (replace(HF, hidden_size=576), 1, 1, "hidden_size=576"),
        (replace(HF, ffn_hidden_size=640), 2, 1, "intermediate_size / parallel.tensor=320"),
        (replace(HF, ffn_hidden_size=640), 1, 2, "intermediate_size / rollout.server_tensor=320"),
        (replace(HF, ffn_hidden_size=640), 1, 1, None),
    ],
)
def test_auto_falls_back_where_a_block_would_cross_a_seam_or_a_cut(
    hf: HFConfig, tensor: int, server: int, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(tensor=tensor, server=server)
    found = why_other_values(asked, hf)
    assert server_dtype(asked, hf) == ("float8" if reason is None else "bfloat16")
    assert found is None if reason is None else found is not None and found.startswith(reason)
    with caplog.at_level(logging.INFO):
        check_weight_sync(asked, hf)
        check_weight_sync(replace(asked, weight_sync=WeightSyncConfig(dtype="float8")), hf)
        check_weight_sync(replace(asked, weight_sync=WeightSyncConfig(dtype="bfloat16")), hf)
    told = [line for line in caplog.messages if line.startswith("weight_sync.dtype=")]
    assert len(told) == (0 if reason is None else 2) and all(reason in line for line in told if reason)


@pytest.mark.parametrize(("key", "value"), [("urls", ("http://a:1",)), ("urls_file", "servers")])
def test_auto_takes_no_servers_for_float8_that_others_started(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    attached = replace(config(), rollout=RolloutConfig(**{key: value}))
    assert server_dtype(attached, HF) == "bfloat16" and export_dtype(attached, HF) is None
    asked = replace(attached, weight_sync=WeightSyncConfig(dtype="float8"))
    assert server_dtype(asked, HF) == "float8"
    with caplog.at_level(logging.INFO):
        check_weight_sync(attached, HF)
        check_weight_sync(asked, HF)
    (told,) = [line for line in caplog.messages if line.startswith("weight_sync.dtype=")]
    assert told.endswith(f"servers of rollout.{key} were started with is not known")


def test_widths_of_experts_count_and_those_of_dense_layers_only_where_there_are_any() -> None:
    moe = MoE(num_experts=4, top_k=2, ffn_hidden_size=256, layers=(True,) * 4, shared_ffn_hidden_size=0)
    sparse = replace(HF, ffn_hidden_size=100, moe=moe)
    assert why_other_values(config(), sparse) is None
    narrow = why_other_values(config(), replace(sparse, moe=replace(moe, ffn_hidden_size=192)))
    assert narrow is not None and narrow.startswith("an expert's width")
    assert why_other_values(config(), replace(sparse, moe=replace(moe, layers=(False, True, True, True)))) is not None


def blocks_of(shard: Tensor, first: int) -> Tensor:
    """The number of its 128 x 128 block for each element of a rank's shard, from `first` on."""
    rows, columns = (torch.arange(size) // 128 for size in shard.shape)
    return first + rows[:, None] * (int(columns.max()) + 1) + columns


def partition(tensors: list[Tensor]) -> Iterator[set[int]]:
    """For each 128 x 128 block of the HF tensors, the trainer's blocks that its elements come from."""
    for whole in tensors:
        for rows in whole.split(128, 0):
            for block in rows.split(128, 1):
                yield set(block.unique().tolist())


def are_the_same(transform: QKV | GateUp | Direct, shards: list[Tensor], dim: int, hf: HFConfig) -> bool:
    """Whether the blocks of the trainer's shards are those of the tensors that they are exported as."""
    numbered, first = [], 0
    for shard in shards:
        numbered.append(blocks_of(shard, first))
        first = int(numbered[-1].max()) + 1
    found = list(partition(transform.merge(numbered, dim, hf)))
    return all(len(each) == 1 for each in found) and len(set.union(*found)) == len(found)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("ffn", [128, 256, 320, 384, 512, 640])
@pytest.mark.parametrize("tensor", [1, 2])
def test_it_is_what_the_mapping_of_weights_makes_of_the_blocks(head_dim: int, ffn: int, tensor: int) -> None:
    hf = replace(HF, head_dim=head_dim, ffn_hidden_size=ffn, hidden_size=256)
    rows = (hf.num_attention_heads + 2 * hf.num_query_groups) * head_dim // tensor
    heads = hf.num_attention_heads * head_dim // tensor
    whole = all(
        [
            are_the_same(QKV(), [torch.empty(rows, 256)] * tensor, 0, hf),
            are_the_same(Direct(), [torch.empty(256, heads)] * tensor, 1, hf),
            are_the_same(GateUp(), [torch.empty(2 * ffn // tensor, 256)] * tensor, 0, hf),
            are_the_same(Direct(), [torch.empty(256, ffn // tensor)] * tensor, 1, hf),
        ]
    )
    assert (why_other_values(config(tensor=tensor), hf) is None) == whole


def test_layers_that_fp8_leaves_out_are_named_and_none_without_fp8(tmp_path: Path) -> None:
    assert list(kept_layers(config(bf16_first_layers=1, bf16_last_layers=2), HF)) == [0, 2, 3]
    assert list(kept_layers(config(), HF)) == []
    assert list(kept_layers(config("none", bf16_first_layers=1), HF)) == []
    raw = {"architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 512, "vocab_size": 32}
    raw |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    asked = replace(config(bf16_last_layers=1), model=ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    assert server_weights(asked) == ("float8", [3])
    assert server_weights(config("none")) == ("bfloat16", ()), "and config.json is not looked for"


def test_scales_that_transformer_engine_is_told_to_make_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    with pytest.raises(ConfigError, match="must go without NVTE_FP8_BLOCK_SCALING_FP32_SCALES"):
        check_weight_sync(config(), HF)
    check_weight_sync(config("tensorwise"), HF)
