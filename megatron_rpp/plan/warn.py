"""What is unwise in a layout, though it would run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_rpp.config.schema import Config
from megatron_rpp.plan.memory import Plan
from megatron_rpp.plan.microbatch import num_microbatches

_IMBALANCE = 1.25  # of the fullest stage to the mean of all


def warnings_of(plan: Plan, config: Config) -> Iterator[str]:
    """One line each."""
    layout, per_node = plan.layout, min(plan.gpus_per_node, plan.gpus)
    if layout.tensor > per_node or per_node % layout.tensor:
        yield (
            f"parallel.tensor={layout.tensor} does not divide the {per_node} GPUs of a node: "
            "tensor parallelism across nodes is slow"
        )
    if layout.data != config.parallel.data:
        yield f"{plan.gpus} GPUs leave parallel.data={layout.data}; the configuration says {config.parallel.data}"
    mean = sum(stage.peak_bytes for stage in plan.stages) / len(plan.stages)
    if plan.worst.peak_bytes > _IMBALANCE * mean:
        yield (
            f"stage {plan.worst.stage} needs {plan.worst.peak_bytes / mean:.2f} times the mean of all stages; "
            "parallel.first_stage_layers and parallel.last_stage_layers move layers away from it"
        )
    microbatches = num_microbatches(replace(config, parallel=layout))
    if microbatches < layout.pipeline:
        size = "train.micro_batch_tokens" if config.train.micro_batch_tokens else "train.micro_batch_size"
        yield (
            f"{microbatches} microbatches a replica leave most of parallel.pipeline={layout.pipeline} stages idle; "
            f"lower {size}"
        )
    if config.model.dtype == "float32":
        yield "model.dtype=float32; bfloat16 halves weights and activations, and GPUs compute it much faster"
