"""The declarative table: which Megatron parameter is which Hugging Face tensors.

A family is how its config.json is read, and a tuple of `Rule`s. In a name, `{i}` is the global layer
index and `{e}` the global index of an expert. Both name sets of Megatron's layer specs are listed: local
(`input_layernorm`) and Transformer Engine's fused modules (`linear_qkv.layer_norm_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from megatron_rpp.model.hf_config import HFConfig, RawConfig
from megatron_rpp.model.hf_mapping.transforms import Direct, Transform


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter pattern, the HF tensors it is made of, and how."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = Direct()  # noqa: RUF009 - stateless
    keeps_dtype: bool = False  # conversion to another dtype leaves it as it is stored

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{([ie])\\}", r"(?P<\1>\\d+)", re.escape(self.megatron)))

    def match(self, megatron_name: str) -> dict[str, str] | None:
        """The indices in a parameter's global name; None where it is another parameter's."""
        found = self._pattern.fullmatch(megatron_name)
        return found.groupdict() if found else None

    def layers(self, hf: HFConfig) -> list[int]:
        """The layers of `hf` that have this parameter: a layer has a dense MLP or experts."""
        has_experts = hf.moe.layers if hf.moe else (False,) * hf.num_layers
        if any(part in self.megatron for part in _absent_parts(hf)):
            return []
        of_experts = any(part in self.megatron for part in (".mlp.router.", ".mlp.experts.", ".mlp.shared_experts."))
        of_dense = ".mlp.linear_fc" in self.megatron
        return [i for i, experts in enumerate(has_experts) if not (of_dense if experts else of_experts)]


def _absent_parts(hf: HFConfig) -> list[str]:
    """Modules that a family has in some of its models, and `hf` in no layer."""
    has_latent_queries = hf.mla is not None and hf.mla.q_lora_rank is not None
    present = {
        ".linear_qkv.bias": hf.qkv_bias,
        ".linear_qkv.": hf.mla is None,
        ".linear_q_proj.": not has_latent_queries,
        ".linear_q_down_proj.": has_latent_queries,
        ".linear_q_up_proj.": has_latent_queries,
        ".q_layernorm.": has_latent_queries or hf.qk_norm,
        ".k_layernorm.": hf.qk_norm,
        ".shared_experts.": hf.moe is not None and hf.moe.shared_ffn_hidden_size > 0,
    }
    return [part for part, is_present in present.items() if not is_present]


def with_rules(rules: tuple[Rule, ...], *own: Rule) -> tuple[Rule, ...]:
    """`rules` and a family's `own`, which take the place of those for the same Megatron parameter."""
    replaced = {rule.megatron for rule in own}
    return (*(rule for rule in rules if rule.megatron not in replaced), *own)


@dataclass(frozen=True)
class Family:
    """The architectures that share rules and the reading of config.json."""

    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    read: Callable[[RawConfig], HFConfig]

    def find(self, megatron_name: str) -> tuple[Rule, tuple[str, ...]]:
        """The rule for a parameter named with its global indices, and its HF names. KeyError if none."""
        for rule in self.rules:
            if (indices := rule.match(megatron_name)) is not None:
                return rule, tuple(name.format(**indices) for name in rule.hf)
        raise KeyError(f"no rule maps the Megatron parameter {megatron_name}; add one to hf_mapping")

    def keeps_dtype(self, hf_name: str) -> bool:
        """Whether conversion to another dtype leaves this Hugging Face tensor as it is stored."""
        return any(pattern.fullmatch(hf_name) for pattern in self._kept)

    @cached_property
    def _kept(self) -> list[re.Pattern[str]]:
        names = [name for rule in self.rules if rule.keeps_dtype for name in rule.hf]
        return [re.compile(re.sub(r"\\\{[ie]\\\}", r"\\d+", re.escape(name))) for name in names]

    def hf_names(self, hf: HFConfig) -> set[str]:
        """Every Hugging Face tensor that a model of shape `hf` may have."""
        experts = range(hf.moe.num_experts if hf.moe else 0)
        names: set[str] = set()
        for rule in self.rules:
            for template in rule.hf:
                indices = rule.layers(hf) if "{i}" in template else (0,)
                each = product(indices, experts if "{e}" in template else (0,))
                names |= {template.format(i=i, e=e) for i, e in each}
        return names
