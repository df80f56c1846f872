"""What families with experts read of config.json alike, and what Megatron's router cannot do as their authors do."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, MoE, RawConfig

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def num_experts(raw: RawConfig) -> int:
    """The number of experts, under whichever name transformers 4, 5 or the model's authors gave it."""
    return raw.size(next((key for key in _COUNTS if key in raw), _COUNTS[0]))


def num_shared_experts(raw: RawConfig, absent: int) -> int:
    """0 where config.json says null, as the models' authors mean it; `absent` where it is silent."""
    return raw.count("n_shared_experts", 0 if "n_shared_experts" in raw else absent)


def checked(hf: HFConfig, raw: RawConfig) -> HFConfig:
    """`hf`, without its experts where no layer has any. Raises ConfigError for a router that Megatron has not."""
    assert hf.moe is not None
    if not any(hf.moe.layers):
        return replace(hf, moe=None)
    if hf.moe.top_k > hf.moe.num_experts:
        raise raw.error(f"num_experts_per_tok={hf.moe.top_k}; it must be at most the {hf.moe.num_experts} experts")
    if error := _router_error(hf.moe):
        raise raw.error(f"{error}, which is not supported")
    return hf


def _router_error(moe: MoE) -> str | None:
    """Why Megatron would choose or weigh experts differently from the model's authors; None if it does not.

    `topk_routing_with_score_function` normalizes sigmoid scores of several experts, never of one. How groups
    of experts are scored is model/layers/router.py's.
    """
    if moe.score == "sigmoid" and not moe.normalize_top_k and moe.top_k > 1:
        return "sigmoid scores of experts that are not normalized (norm_topk_prob=false)"
    if moe.normalize_top_k and moe.top_k == 1:
        return "a normalized score of a single expert (num_experts_per_tok=1)"
    if moe.score == "softmax" and moe.selection_bias:
        return "a selection bias on softmax scores of experts"
    if moe.top_groups >= moe.num_groups:
        return None
    in_group, rest = divmod(moe.num_experts, moe.num_groups)
    if rest or moe.top_k > moe.top_groups * in_group or (in_group == 1 and moe.group_score == "top2_sum"):
        groups = f"n_group={moe.num_groups} and topk_group={moe.top_groups}"
        return f"{groups} for num_experts_per_tok={moe.top_k} of {moe.num_experts} experts"
    if moe.score == "softmax" and moe.normalize_top_k:
        return "groups of experts with normalized softmax scores"
    return None
