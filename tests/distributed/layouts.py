"""Layouts to compare, and how a worker script is run on one of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import MOE_FAMILY_NAMES

LAYOUTS = {
    "tp1_pp1_dp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2_distributed_optimizer": ParallelConfig(data=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp3_first2": ParallelConfig(pipeline=3, first_stage_layers=2),
}
EXPERT_LAYOUTS = {  # for families with experts
    "dp2_ep2": ParallelConfig(data=2, expert=2),
    "tp2_sp_ep2": ParallelConfig(tensor=2, sequence=True, expert=2),
    "pp2_dp2_ep2": ParallelConfig(pipeline=2, data=2, expert=2),
    "tp2_sp_etp2": ParallelConfig(tensor=2, sequence=True, expert_tensor=2),
    "tp2_sp_dp2_ep4": ParallelConfig(tensor=2, sequence=True, data=2, expert=4),
    "dp4_ep2_etp2": ParallelConfig(data=4, expert=2, expert_tensor=2),
}


CONTEXT_LAYOUTS = {  # packed alone
    "cp2": ParallelConfig(context=2),
    "tp2_cp2": ParallelConfig(tensor=2, context=2),
    "tp2_sp_cp2": ParallelConfig(tensor=2, sequence=True, context=2),
    "pp2_cp2": ParallelConfig(pipeline=2, context=2),
    "cp2_dp2": ParallelConfig(context=2, data=2),
}
EXPERT_CONTEXT_LAYOUTS = {  # CP ranks, and those of two replicas, meet in the same experts
    "cp2_ep2": ParallelConfig(context=2, expert=2),
    "cp2_dp2_ep4": ParallelConfig(context=2, data=2, expert=4),
}
# Attention with grouped queries, with windows and caps, latent; experts, and both.
PACKED_EVERYWHERE = ("llama", "gemma2", "mla_dense", "mixtral", "deepseek_v3")
PACKED_ALWAYS = ("tp1_pp1_dp1", "cp2", "tp2_sp_cp2")  # every family
PACKED = ("tp1_pp1_dp1", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2_distributed_optimizer", "dp2_ep2")
PACKED_TOKENS = 26  # of some 70 in tests.distributed.invariance_worker's batch: microbatches of several lengths


def layouts_of(family: str) -> dict[str, ParallelConfig]:
    """The layouts that the tiny model `family` can be split over: experts want sequence parallelism beside TP."""
    if family not in MOE_FAMILY_NAMES:
        return LAYOUTS
    return _with_experts(LAYOUTS) | EXPERT_LAYOUTS


def packed_layouts_of(family: str) -> dict[str, ParallelConfig]:
    """The layouts that `family` can be run on with packed sequences."""
    padded_too = {name: layout for name, layout in layouts_of(family).items() if name in PACKED}
    if family not in MOE_FAMILY_NAMES:
        return padded_too | CONTEXT_LAYOUTS
    return padded_too | _with_experts(CONTEXT_LAYOUTS) | EXPERT_CONTEXT_LAYOUTS


def packed_runs_of(family: str) -> list[str]:
    """Of those the ones that test_layout_invariance runs: of families whose attention is like another's, a few."""
    found = list(packed_layouts_of(family))
    return found if family in PACKED_EVERYWHERE else [name for name in found if name in PACKED_ALWAYS]


def _with_experts(layouts: dict[str, ParallelConfig]) -> dict[str, ParallelConfig]:
    return {name: layout for name, layout in layouts.items() if layout.tensor == 1 or layout.sequence}


def run_on(layout: ParallelConfig, script: str, arguments: dict[str, Any], out: Path) -> None:
    """Run tests/distributed/SCRIPT on every rank of `layout`; it finds its arguments in sys.argv."""
    world_size = layout.world_size
    run_ranks(f"tests.distributed.{script}", [json.dumps(asdict(layout)), json.dumps(arguments)], world_size, out)


def worker_config(model_path: str, micro_batch_tokens: int = 0) -> tuple[Config, dict[str, Any]]:
    """(the run's configuration, the arguments) inside a worker."""
    layout, arguments = (json.loads(text) for text in sys.argv[1:3])
    config = Config(
        model=ModelConfig(path=model_path),
        parallel=ParallelConfig(**layout),
        train=TrainConfig(
            batch_size=8,
            micro_batch_size=arguments.get("micro_batch_size", 2),
            micro_batch_tokens=micro_batch_tokens,
        ),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    return config, arguments
