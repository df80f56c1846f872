"""Experts by name: global indices out of each EP rank's local ones, in both of Megatron's name sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_rpp.model.hf_config import HFConfig, MoE
from megatron_rpp.model.hf_mapping import MIXTRAL, QWEN3_MOE
from megatron_rpp.model.hf_mapping.transforms import GateUp, Shard
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters

HELD = 2  # of 6 experts, on 3 EP ranks


def module(**parameters: torch.Tensor) -> nn.Module:
    leaf = nn.Module()
    for name, value in parameters.items():
        leaf.register_parameter(name, nn.Parameter(value))
    return leaf


def tree(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


class TERowParallelGroupedLinear(nn.Module):  # the name is how shards.py knows it
    """Transformer Engine's grouped module of a rank: a weight an expert; its parallel_mode is None under EP."""

    parallel_mode = None

    def __init__(self) -> None:
        super().__init__()
        for i in range(HELD):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(2, 2)))


def model(experts: nn.Module, ep_rank: int) -> nn.Module:
    """One decoder layer, the model's third, as EP rank `ep_rank` of 3 holds it."""
    layer: Any = tree(
        router=module(weight=torch.zeros(6, 2)), experts=experts, shared_experts=module(weight=torch.zeros(2))
    )
    layer.router.register_buffer("expert_bias", torch.zeros(6))
    layer.router.register_buffer("local_tokens_per_expert", torch.zeros(6), persistent=False)
    layer.num_local_experts, layer.config = HELD, SimpleNamespace(num_moe_experts=6)
    layer.local_expert_indices = [ep_rank * HELD + i for i in range(HELD)]
    block: Any = tree(mlp=layer)
    block.layer_number = 3
    found: Any = tree(decoder=tree(layers=nn.ModuleList([block])))
    found.share_embeddings_and_output_weights = False
    return found


def local_experts() -> nn.Module:
    each = [tree(linear_fc1=module(weight=torch.zeros(2, 2))) for _ in range(HELD)]
    return tree(local_experts=nn.ModuleList(each))


def items(experts: nn.Module, ep_rank: int) -> dict[str, ShardedParameter]:
    return {item.name: item for item in sharded_parameters([model(experts, ep_rank)])}


@pytest.mark.parametrize("ep_rank", range(3))
def test_local_experts_are_named_by_their_global_index(ep_rank: int) -> None:
    prefix = "decoder.layers.2.mlp.experts.local_experts"
    found = {name: item for name, item in items(local_experts(), ep_rank).items() if item.is_expert}
    assert list(found) == [f"{prefix}.{ep_rank * HELD + i}.linear_fc1.weight" for i in range(HELD)]
    second = list(found.values())[1]
    assert second.ep_names == tuple(f"{prefix}.{i}.linear_fc1.weight" for i in (1, 3, 5))


def test_grouped_experts_are_named_by_their_global_index_and_split_by_columns() -> None:
    """Grouped modules say parallel_mode=None where experts are split, so the class has to tell."""
    prefix = "decoder.layers.2.mlp.experts.linear_fc2.weight"
    found = [i for i in items(tree(linear_fc2=TERowParallelGroupedLinear()), 2).values() if i.is_expert]
    assert [(item.name, item.dim) for item in found] == [(f"{prefix}4", 1), (f"{prefix}5", 1)]
    assert found[0].ep_names == (f"{prefix}0", f"{prefix}2", f"{prefix}4")


def test_router_and_shared_experts_belong_to_no_expert_and_the_bias_is_listed() -> None:
    found = items(local_experts(), 1)
    others = [name for name, item in found.items() if not item.is_expert]
    prefix = "decoder.layers.2.mlp"
    assert others == [f"{prefix}.router.weight", f"{prefix}.shared_experts.weight", f"{prefix}.router.expert_bias"]


@pytest.mark.parametrize(
    "megatron",
    [
        "decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight",
        "decoder.layers.3.mlp.experts.linear_fc1.weight17",
    ],
)
def test_both_name_sets_find_the_expert(megatron: str) -> None:
    qwen, mixtral = QWEN3_MOE.find(megatron), MIXTRAL.find(megatron)
    assert qwen[1] == tuple(f"model.layers.3.mlp.experts.17.{part}_proj.weight" for part in ("gate", "up"))
    assert mixtral[1] == tuple(f"model.layers.3.block_sparse_moe.experts.17.{part}.weight" for part in ("w1", "w3"))
    assert qwen[0].transform == mixtral[0].transform == GateUp("expert")


def test_each_kind_of_mlp_has_its_own_width() -> None:
    moe = MoE(6, 2, 4, (True,), shared_ffn_hidden_size=6)
    hf = HFConfig("", 1, 2, 8, 1, 1, 2, 9, 1e-6, None, 64, False, moe=moe)  # type: ignore[arg-type]
    for of, width in (("dense", 8), ("expert", 4), ("shared", 6)):
        gate_up = GateUp(of)  # type: ignore[arg-type]
        parts = [torch.rand(width, 2), torch.rand(width, 2)]
        shards = [gate_up.split(parts, Shard(0, rank, 2, width), hf) for rank in (0, 1)]
        assert all(torch.equal(a, b) for a, b in zip(gate_up.merge(shards, 0, hf), parts, strict=True))
        with pytest.raises(ValueError, match=r"rows where config\.json implies"):
            gate_up.split([torch.rand(width + 1, 2)] * 2, Shard(0, 0, 1, width), hf)
