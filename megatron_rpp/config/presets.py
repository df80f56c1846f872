"""Named settings of `[algorithm]` that reproduce the paper, the peers and other estimators.

A preset is what differs from the paper's REINFORCE++. The peers' semantics are those of August 2026;
docs/algorithm.md shows every key of every preset and says where a peer is not followed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.ranges import check_ranges
from megatron_rpp.config.schema import AlgorithmConfig

_OPENRLHF: Mapping[str, Any] = {
    "kl_coef": 0.01,
    "kl_clamp": 0.0,
    "kl_output_clamp": 10.0,
    "gamma_skips_masked": False,
    "reward_clip": 10.0,
}
_VERL: Mapping[str, Any] = {
    "kl_coef": 0.0,
    "kl_clamp": 0.0,
    "variance_ddof": 1,
    "variance_floor": "add",
    "dual_clip": 3.0,
}
_SLIME: Mapping[str, Any] = {
    "kl_coef": 0.0,
    "kl_clamp": 0.0,
    "gamma_skips_masked": False,
    "variance_ddof": 1,
    "variance_floor": "add",
    "log_ratio_clamp": 0.0,
    "loss_aggregation": "sequence_mean",
}
_NO_REWARD_KL: Mapping[str, Any] = {"kl_placement": "none", "kl_coef": 0.0}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "paper_baseline": {"estimator": "reinforce_pp_baseline", **_NO_REWARD_KL, "kl_loss_coef": 0.001},
    "openrlhf": _OPENRLHF,
    "openrlhf_baseline": {**_OPENRLHF, "estimator": "reinforce_pp_baseline"},
    "verl": _VERL,
    "verl_baseline": {
        **_VERL,
        "estimator": "reinforce_pp_baseline",
        "kl_placement": "folded",
        "lone_sample": "raw",
    },
    "slime": _SLIME,
    "slime_baseline": {**_SLIME, "estimator": "reinforce_pp_baseline", "kl_placement": "instant"},
    "nemo_rl": {
        "estimator": "reinforce_pp_baseline",
        "kl_placement": "instant",
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "kl_clamp": 20.0,
        "kl_output_clamp": 10.0,
        "log_ratio_clamp": 0.0,
    },
    "grpo": {
        "estimator": "grpo",
        **_NO_REWARD_KL,
        "kl_loss_coef": 0.04,
        "kl_loss_estimator": "k3",
        "loss_aggregation": "sequence_mean",
    },
    "dr_grpo": {"estimator": "dr_grpo", **_NO_REWARD_KL, "loss_aggregation": "constant"},
    "rloo": {"estimator": "rloo", "kl_placement": "folded"},
    "remax": {"estimator": "remax"},
}

NOT_PRESET = ("num_samples_per_prompt",)
"""Keys of `[algorithm]` that no preset sets."""

GROUP_ESTIMATORS = ("reinforce_pp_baseline", "grpo", "dr_grpo", "rloo")
"""Estimators whose baseline comes from the other responses to the same prompt."""


def algorithm_config(preset: str | AlgorithmConfig = "paper", **overrides: Any) -> AlgorithmConfig:
    """The settings of a named preset, or of a whole configuration, with `overrides` (keys of `[algorithm]`).

    Raises:
        ConfigError: an unknown preset or key, or a value that the key cannot have.
    """
    base = preset if isinstance(preset, AlgorithmConfig) else AlgorithmConfig(preset=preset, **_settings(preset))
    if not overrides:
        return base
    for key in overrides:
        if key not in _KEYS:
            raise ConfigError(f"unknown setting {key}; {_did_you_mean(key)}")
    check_ranges({f"algorithm.{key}": value for key, value in overrides.items()})
    return replace(base, **overrides)


def preset_values(preset: str) -> dict[str, Any]:
    """Every key of `[algorithm]` that a preset stands for, with its value. ConfigError for an unknown preset."""
    return {key: value for key, value in vars(algorithm_config(preset)).items() if key not in NOT_PRESET}


def _settings(preset: str) -> Mapping[str, Any]:
    if preset not in PRESETS:
        raise ConfigError(f"algorithm.preset={preset} must be one of: {', '.join(PRESETS)}")
    return PRESETS[preset]


_KEYS = {field.name for field in fields(AlgorithmConfig)}


def _did_you_mean(key: str) -> str:
    near = difflib.get_close_matches(key, sorted(_KEYS), n=1)
    return f"did you mean {near[0]}?" if near else f"the settings are: {', '.join(sorted(_KEYS))}"
