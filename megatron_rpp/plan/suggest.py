"""What to change where a run does not fit; every suggestion has been planned, and fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_rpp.config.fields import build, flatten
from megatron_rpp.config.schema import Config, ParallelConfig
from megatron_rpp.config.toml_text import written
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import without_mtp
from megatron_rpp.plan.estimate import GPUS_PER_NODE, least_bytes, plan, shares_gpus, total_parameters
from megatron_rpp.plan.memory import Plan

_LARGEST_JOB = 1 << 14  # GPUs, up to which a job is looked for where N are too few


@dataclass(frozen=True)
class Suggestion:
    """Settings that make a run fit."""

    settings: Mapping[str, Any]  # by key
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"settings": dict(self.settings), "gpus": self.plan.gpus, "needed_bytes": self.plan.needed_bytes}

    def __str__(self) -> str:
        return " ".join(f"--{key}={written(value)}" for key, value in self.settings.items())


def suggest(config: Config, gpus: int, gpu_bytes: float) -> Suggestion | None:
    """The one setting that helps most if one is enough, of those that cost no time first; else the smallest layout that
    fits; else more GPUs; else None.

    A layout that is wholly unset is not changed setting by setting: its smallest one is looked for at once.
    """
    if config.parallel != ParallelConfig(data=config.parallel.data):
        for changes in (_single_changes(config), _slower_changes(config)):
            fitting = list(_fitting(config, gpus, gpu_bytes, changes))
            if fitting:
                return min(fitting, key=lambda found: found.plan.needed_bytes)
    size = gpus
    while size <= _LARGEST_JOB:
        if (layout := smallest_layout(config, size, gpu_bytes)) is not None:
            return layout
        size *= 2
    return None


def smallest_layout(config: Config, gpus: int, gpu_bytes: float) -> Suggestion | None:
    """The fewest ranks a replica that fit, on exactly `gpus` GPUs.

    Where no split is enough, also with the smallest microbatch, and servers that spread over a node and sleep.
    """
    splits = list(_layouts(config, gpus))
    for more in _reliefs(config, gpus):
        layouts = ({**split, **more} for split in splits)
        found = next(_fitting(config, gpus, gpu_bytes, layouts), None)
        if found is not None:
            return replace(found, settings={**found.settings, "parallel.data": found.plan.layout.data})
    return None


def _single_changes(config: Config) -> Iterator[dict[str, Any]]:
    parallel, per_node = config.parallel, config.slurm.gpus_per_node or GPUS_PER_NODE
    yield {"optimizer.distributed": True}
    yield _small_microbatch(config)
    yield {"parallel.sequence": True}
    yield {"model.dtype": "bfloat16"}
    yield {"rollout.release_memory": True}
    for factor in (2, 4, 8, 16):
        yield {"parallel.pipeline": parallel.pipeline * factor}
        yield {"parallel.expert": parallel.expert * factor}
        if config.train.micro_batch_tokens:
            yield {"parallel.context": parallel.context * factor}
        if parallel.tensor * factor <= per_node:
            yield {"parallel.tensor": parallel.tensor * factor}
        if config.rollout.server_tensor * factor <= per_node:
            yield {"rollout.server_tensor": config.rollout.server_tensor * factor}


def _slower_changes(config: Config) -> Iterator[dict[str, Any]]:
    """What trades time for memory on the same layout."""
    parts = ("optimizer", "gradients", *(["reference"] if config.algorithm.uses_reference else []))
    yield {"memory.recompute": "full"}
    yield {"memory.offload": parts}
    if shares_gpus(config):
        yield {"memory.offload": parts, "rollout.release_memory": True}


def _reliefs(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """What may come beside a layout."""
    small = _small_microbatch(config)
    yield {}
    if not small.items() <= flatten(config).items():
        yield small
    if config.train.micro_batch_tokens:
        yield from ({**small, "parallel.context": size} for size in _powers(gpus) if size > config.parallel.context)
    if shares_gpus(config):
        per_node = min(config.slurm.gpus_per_node or GPUS_PER_NODE, gpus)
        yield {**small, "rollout.server_tensor": per_node, "rollout.release_memory": True}


def _small_microbatch(config: Config) -> dict[str, Any]:
    """The smallest that there is."""
    if config.train.micro_batch_tokens:
        return {"train.micro_batch_tokens": config.rollout.context_length}
    return {"train.micro_batch_size": 1}


def _layouts(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Splits over powers of two, the fewest ranks a replica first, of equal ones the one with least pipeline."""
    hf = read_hf_config(config.model.path)
    per_node = min(config.slurm.gpus_per_node or GPUS_PER_NODE, gpus)
    tensors, pipelines = _powers(per_node), _powers(min(gpus, hf.num_layers))
    experts = _powers(min(gpus, hf.moe.num_experts)) if hf.moe else [1]
    sizes = sorted(product(tensors, pipelines, experts), key=lambda size: (size[0] * size[1], size[1], size[2]))
    for tensor, pipeline, expert in sizes:
        if gpus % (tensor * pipeline) == 0:
            yield {
                "parallel.tensor": tensor,
                "parallel.sequence": tensor > 1,
                "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": 1,
                **_ends(hf, pipeline),
                "parallel.expert": expert,
                "parallel.expert_tensor": 1,
                "optimizer.distributed": True,
            }


def _ends(hf: HFConfig, pipeline: int) -> dict[str, Any]:
    """Fewer layers on the first and the last stage, where they do not divide over all stages."""
    if hf.num_layers % pipeline == 0:
        return {"parallel.first_stage_layers": 0, "parallel.last_stage_layers": 0}
    inner = -(-hf.num_layers // pipeline)
    left = max(hf.num_layers - inner * (pipeline - 2), 0)
    return {"parallel.first_stage_layers": -(-left // 2), "parallel.last_stage_layers": left // 2}


def _fitting(config: Config, gpus: int, gpu_bytes: float, changes: Iterator[dict[str, Any]]) -> Iterator[Suggestion]:
    """Of `changes` to the configuration, those that can be and that fit; of their settings, those that do change."""
    values = flatten(config)
    total, experts = total_parameters(without_mtp(read_hf_config(config.model.path)), config.model)
    for change in changes:
        changed = {key: value for key, value in change.items() if value != values[key]}
        wanted = build({**values, **changed})
        if not changed or least_bytes(wanted, total, experts) > gpu_bytes:
            continue
        try:
            found = plan(wanted, gpus)
        except ValueError:  # does not divide
            continue
        if found.fits(gpu_bytes):
            yield Suggestion(changed, found)


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]
