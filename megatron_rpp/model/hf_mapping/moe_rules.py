"""Rules of the experts' parameters, for every family that has some.

An expert is named by its global index. Megatron's two name sets: one module an expert
(`experts.local_experts.3.linear_fc1.weight`) and Transformer Engine's grouped one
(`experts.linear_fc1.weight3`). transformers 5 fuses experts in memory and writes them one by one again,
under the names that hub checkpoints have.
"""

from __future__ import annotations

from megatron_rpp.model.hf_mapping.table import Rule
from megatron_rpp.model.hf_mapping.transforms import GateUp

_MEGATRON = "decoder.layers.{i}.mlp"
_HF = "model.layers.{i}.mlp"

SELECTION_BIAS = Rule(f"{_MEGATRON}.router.expert_bias", (f"{_HF}.gate.e_score_correction_bias",), keeps_dtype=True)
SHARED_EXPERTS = (
    Rule(
        f"{_MEGATRON}.shared_experts.linear_fc1.weight",
        (f"{_HF}.shared_experts.gate_proj.weight", f"{_HF}.shared_experts.up_proj.weight"),
        GateUp("shared"),
    ),
    Rule(f"{_MEGATRON}.shared_experts.linear_fc2.weight", (f"{_HF}.shared_experts.down_proj.weight",)),
)


def expert_rules(
    hf: str = _HF, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Router and experts. `hf` is the module of experts and router in a Hugging Face model."""
    expert = f"{hf}.experts.{{e}}"
    gate_up, down_proj = (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"), (f"{expert}.{down}.weight",)
    return (
        Rule(f"{_MEGATRON}.router.weight", (f"{hf}.gate.weight",)),
        Rule(f"{_MEGATRON}.experts.local_experts.{{e}}.linear_fc1.weight", gate_up, GateUp("expert")),
        Rule(f"{_MEGATRON}.experts.local_experts.{{e}}.linear_fc2.weight", down_proj),
        Rule(f"{_MEGATRON}.experts.linear_fc1.weight{{e}}", gate_up, GateUp("expert")),
        Rule(f"{_MEGATRON}.experts.linear_fc2.weight{{e}}", down_proj),
    )
