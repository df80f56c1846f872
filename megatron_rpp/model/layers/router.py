"""The router of models that score groups of experts in a way that Megatron's own does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_rpp.model.hf_config import MoE


def use_group_router(mlp: ModuleSpec | partial[Any], moe: MoE | None) -> None:
    """Give the experts of the spec `mlp` the router of `moe`, where it is not Megatron's."""
    # Megatron-Core 0.19 (November 2026) has a partial of the class here, 0.16 a ModuleSpec.
    kind: Any = mlp.func if isinstance(mlp, partial) else mlp.module
    if moe is not None and kind is MoELayer and needs_group_router(moe):
        parts: Any = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        parts.router = partial(GroupRouter, choice=GroupChoice(moe))


def needs_group_router(moe: MoE) -> bool:
    """`group_limited_topk` scores a group of experts by the sum of its best top_k // top_groups."""
    return moe.top_groups < moe.num_groups and moe.top_k // moe.top_groups != _summed(moe)


class GroupRouter(TopKRouter):
    """Megatron's router, which hands the choice of experts to `choice`."""

    def __init__(self, *, choice: GroupChoice, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # If there is such an object, `topk_routing_with_score_function` asks it for the experts that it would
        # otherwise choose itself; scores, their scaling and the dispatch stay Megatron's.
        self.router_replay: Any = choice


class GroupChoice:
    """Stands where Megatron expects a `RouterReplay`."""

    def __init__(self, moe: MoE) -> None:
        self._moe = moe

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [T, experts] -> (scores, experts) [T, topk] of the best experts in the best groups."""
        moe = self._moe
        grouped = scores.unflatten(1, (moe.num_groups, -1))  # [T, groups, experts of a group]
        of_group = grouped.topk(_summed(moe), dim=-1).values.sum(-1)
        chosen = of_group.topk(moe.top_groups, dim=-1).indices
        closed = torch.ones_like(of_group, dtype=torch.bool).scatter(1, chosen, False)
        return grouped.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(topk, dim=-1)


def _summed(moe: MoE) -> int:
    """How many of a group's best scores make up its own."""
    return 1 if moe.group_score == "max" else 2
