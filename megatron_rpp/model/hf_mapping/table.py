"""The declarative table: which Megatron parameter is which Hugging Face tensors.

A family is a tuple of `Rule`s. `{i}` in a name is the global layer index. Both name sets of Megatron's
layer specs are listed: local (`input_layernorm`) and Transformer Engine's fused modules
(`linear_qkv.layer_norm_weight`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rpp.model.hf_mapping.transforms import Direct, Transform


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter pattern, the HF tensors it is made of, and how."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = Direct()  # noqa: RUF009 - stateless


@dataclass(frozen=True)
class Family:
    """All rules of the architectures that share them."""

    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]

    def find(self, megatron_name: str) -> tuple[Rule, tuple[str, ...]]:
        """The rule for a parameter named with its global layer index, and its HF names. KeyError if none."""
        for rule in self.rules:
            pattern = re.escape(rule.megatron).replace(r"\{i\}", r"(\d+)")
            if match := re.fullmatch(pattern, megatron_name):
                index = match.group(1) if match.groups() else ""
                return rule, tuple(name.format(i=index) for name in rule.hf)
        raise KeyError(f"no rule maps the Megatron parameter {megatron_name}; add one to hf_mapping")

    def hf_names(self, num_layers: int) -> set[str]:
        """Every Hugging Face tensor that a model of `num_layers` layers may have."""
        return {name.format(i=i) for rule in self.rules for name in rule.hf for i in range(num_layers)}
