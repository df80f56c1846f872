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


def layouts_of(family: str) -> dict[str, ParallelConfig]:
    """The layouts that the tiny model `family` can be split over: experts want sequence parallelism beside TP."""
    if family not in MOE_FAMILY_NAMES:
        return LAYOUTS
    return {n: layout for n, layout in LAYOUTS.items() if layout.tensor == 1 or layout.sequence} | EXPERT_LAYOUTS


def run_on(layout: ParallelConfig, script: str, arguments: dict[str, Any], out: Path) -> None:
    """Run tests/distributed/SCRIPT on every rank of `layout`; it finds its arguments in sys.argv."""
    world_size = layout.world_size
    run_ranks(f"tests.distributed.{script}", [json.dumps(asdict(layout)), json.dumps(arguments)], world_size, out)


def worker_config(model_path: str) -> tuple[Config, dict[str, Any]]:
    """(the run's configuration, the arguments) inside a worker."""
    layout, arguments = (json.loads(text) for text in sys.argv[1:3])
    config = Config(
        model=ModelConfig(path=model_path),
        parallel=ParallelConfig(**layout),
        train=TrainConfig(batch_size=8, micro_batch_size=arguments.get("micro_batch_size", 2)),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    return config, arguments
