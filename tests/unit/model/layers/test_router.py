"""Which experts a token gets, and at what weight: Megatron's router, or ours in its place, against transformers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import megatron_rpp.device  # noqa: F401 - before any import of megatron
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_config import HFConfig, MoE
from megatron_rpp.model.layers.router import GroupChoice, needs_group_router
from megatron_rpp.model.moe_config import moe_settings

EXPERTS, HIDDEN, TOKENS = 12, 16, 500
SOFTMAX = MoE(EXPERTS, 4, 8, (True,), normalize_top_k=False, scale=1.7)
SIGMOID = replace(SOFTMAX, score="sigmoid", normalize_top_k=True, selection_bias=True)
CASES = {
    "v2_greedy": SOFTMAX,
    "v2_best_expert_of_a_group": replace(SOFTMAX, num_groups=4, top_groups=2, group_score="max"),
    "v2_one_expert_a_group": replace(SOFTMAX, num_groups=4, top_groups=3, group_score="max"),
    "v3_ungrouped": SIGMOID,
    "v3_two_experts_a_group": replace(SIGMOID, num_groups=4, top_groups=2),
    "v3_one_expert_a_group": replace(SIGMOID, num_groups=4, top_groups=3),
    "v3_six_experts_of_two_groups": replace(SIGMOID, num_groups=3, top_groups=2, top_k=6),
}


def theirs(moe: MoE) -> torch.nn.Module:
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.scale,
    }
    if moe.score == "sigmoid":
        router = DeepseekV3TopkRouter(DeepseekV3Config(**sizes))
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    else:
        method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
        router = DeepseekV2TopkRouter(DeepseekV2Config(**sizes, topk_method=method))
    torch.nn.init.normal_(router.weight)
    return router


def ours(moe: MoE, logits: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, experts] weights as `TopKRouter.routing` asks for them."""
    hf: Any = replace(HFConfig(*[None] * 12), moe=moe)  # type: ignore[arg-type]
    settings = moe_settings(hf, ParallelConfig(), "local")
    weights, chosen = topk_routing_with_score_function(
        logits,
        settings["moe_router_topk"],
        use_pre_softmax=settings["moe_router_pre_softmax"],
        num_groups=settings["moe_router_num_groups"],
        group_topk=settings["moe_router_group_topk"],
        scaling_factor=settings["moe_router_topk_scaling_factor"],
        score_function=settings["moe_router_score_function"],
        expert_bias=bias,
        router_replay=GroupChoice(moe) if needs_group_router(moe) else None,  # type: ignore[arg-type]
    )
    assert torch.equal(chosen, weights != 0)
    return weights


@pytest.mark.parametrize("case", CASES)
def test_experts_and_their_weights_are_those_of_transformers(case: str) -> None:
    torch.manual_seed(5)
    moe = CASES[case]
    router = theirs(moe)
    logits, weights, experts = router(torch.randn(TOKENS, HIDDEN) * 0.3)
    expected = torch.zeros_like(logits).scatter(1, experts, weights)
    found = ours(moe, logits, getattr(router, "e_score_correction_bias", None))
    assert torch.equal(found != 0, expected != 0)
    assert (found - expected).abs().max() < 1e-6


def test_megatrons_own_choice_of_groups_serves_where_it_sums_as_many_scores_as_the_model() -> None:
    needed = {case for case, moe in CASES.items() if needs_group_router(moe)}
    assert needed == {"v2_best_expert_of_a_group", "v3_one_expert_a_group", "v3_six_experts_of_two_groups"}


@pytest.mark.parametrize("case", ["v2_best_expert_of_a_group", "v3_one_expert_a_group"])
def test_megatrons_own_choice_would_differ_where_ours_takes_its_place(case: str) -> None:
    """Otherwise the comparison above would prove nothing."""
    torch.manual_seed(5)
    moe = CASES[case]
    scores = torch.rand(TOKENS, EXPERTS)
    plain = topk_routing_with_score_function(
        scores, moe.top_k, use_pre_softmax=True, num_groups=moe.num_groups, group_topk=moe.top_groups
    )[1]
    chosen = torch.zeros_like(plain).scatter(1, GroupChoice(moe).get_replay_topk(scores, moe.top_k)[1], True)
    assert (plain != chosen).any(1).sum() > TOKENS // 20
