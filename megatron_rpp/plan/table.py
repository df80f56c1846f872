"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_rpp.config.layout_words import in_short
from megatron_rpp.plan.memory import GIB, RESERVE_BYTES, Plan, StageMemory
from megatron_rpp.plan.suggest import Suggestion

_COLUMNS = ("parameter", "copies", "gradient", "optimizer", "reference", "activation", "logits", "working", "sync")


def text(plan: Plan, gpu_bytes: float) -> str:
    """The layout, a line a stage (equal neighbours in one), and whether it fits."""
    layout = plan.layout
    lines = [
        f"{plan.total_parameters:,} parameters on {plan.gpus} GPUs, {min(plan.gpus_per_node, plan.gpus)} a node: "
        f"{in_short(layout)}"
        + (f", EP {layout.expert} x ETP {layout.expert_tensor}" if layout.expert * layout.expert_tensor > 1 else ""),
        "",
        "GiB a GPU, on the fullest rank of each stage",
        *_rows(plan),
        "",
        f"{plan.needed_bytes / GIB:.1f} GiB needed on the fullest GPU of {gpu_bytes / GIB:.1f}, "
        f"with {RESERVE_BYTES // GIB} for CUDA and NCCL",
    ]
    if plan.servers is not None:
        when = "while the trainer waits" if plan.servers.sleep_while_training else "always"
        lines.append(
            f"SGLang on the same GPUs, {when}: {plan.servers.weight_bytes / GIB:.1f} GiB of weights, "
            f"{max(plan.left_for_kv_cache(gpu_bytes), 0) / GIB:.1f} left for its KV cache"
        )
    if plan.host_bytes:
        lines.append(f"off-loaded while servers sample: {plan.host_bytes / GIB:.1f} GiB of a node's host memory")
    return "\n".join(lines + [f"warning: {warning}" for warning in plan.warnings]) + "\n"


def verdict(plan: Plan, gpu_bytes: float, better: Suggestion | None) -> str:
    """By how much a plan that does not fit misses, and what makes it fit."""
    over = f"does not fit: {(plan.needed_bytes - gpu_bytes) / GIB:.1f} GiB too much\n"
    if better is None:
        return over + "no layout fits that was looked for; choose GPUs with more memory, or a smaller model\n"
    gpus = f" --gpus={better.plan.gpus}" if better.plan.gpus != plan.gpus else ""
    more = f"on {plan.gpus} GPUs no layout fits; " if gpus else ""
    return f"{over}{more}it fits with {better}{gpus}: {better.plan.needed_bytes / GIB:.1f} GiB\n"


def as_json(plan: Plan, gpu_bytes: float) -> dict[str, Any]:
    """Everything, in bytes."""
    values = asdict(plan)
    for stage, memory in zip(values["stages"], plan.stages, strict=True):
        stage |= {"peak_bytes": memory.peak_bytes, "sampling_bytes": memory.sampling_bytes}
    left = None if plan.servers is None else plan.left_for_kv_cache(gpu_bytes)
    verdict = {"needed_bytes": plan.needed_bytes, "gpu_bytes": gpu_bytes, "fits": plan.fits(gpu_bytes)}
    return {**values, **verdict, "left_for_kv_cache_bytes": left, "host_bytes": plan.host_bytes}


def _rows(plan: Plan) -> Iterator[str]:
    yield f"{'stage':>9}{'layers':>8}" + "".join(f"{name:>11}" for name in _columns(plan)) + f"{'peak':>11}"
    stages, columns = list(plan.stages), _columns(plan)
    while stages:
        same = 1
        while same < len(stages) and _numbers(stages[same], columns) == _numbers(stages[0], columns):
            same += 1
        first, last = stages[0].stage, stages[same - 1].stage
        name = f"{first}" if first == last else f"{first}-{last}"
        yield f"{name:>9}{stages[0].num_layers:>8}{_numbers(stages[0], columns)}"
        del stages[:same]


def _columns(plan: Plan) -> list[str]:
    """Without that of FP8 copies where there are none."""
    has_copies = any(stage.copies_bytes for stage in plan.stages)
    return [name for name in _COLUMNS if name != "copies" or has_copies]


def _numbers(stage: StageMemory, columns: Sequence[str]) -> str:
    values = [getattr(stage, f"{name}_bytes") for name in columns]
    return "".join(f"{value / GIB:>11.2f}" for value in (*values, stage.peak_bytes))
