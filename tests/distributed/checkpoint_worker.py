"""One rank: train two steps, save; or load and report the state, then train a third step."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.algorithm.shaping import RunningMoments
from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.parallel import bootstrap
from tests.distributed.invariance_worker import ROWS, fixed_batch
from tests.distributed.layouts import worker_config


def main() -> None:
    arguments = json.loads(sys.argv[2])
    config, _ = worker_config(arguments["model"], arguments["micro_batch_tokens"])
    parallel = bootstrap.initialize(config.parallel, seed=0)
    model = build_model(config, parallel, path=config.model.path)
    policy, optimizer = make_trainable(model, config.optimizer, total_steps=10)
    batch = fixed_batch().rows(torch.arange(parallel.dp_rank, ROWS, parallel.dp_size))
    shaping = ShapingState(kl_coef=0.25, rewards=RunningMoments(3.0, 0.5, 1.5))
    batch, _, _ = add_advantages(batch, config, parallel, shaping)
    if arguments["action"] == "save":
        for _ in range(2):
            train_step(policy, optimizer, batch, config)
        state = RunState(2, {"cursor": 5}, optimizer.schedule.state_dict(), asdict(shaping))
        checkpointer = Checkpointer(arguments["run_dir"], config.model.path, config.checkpoint)
        checkpointer.save(policy, optimizer, state)
    else:
        path = find_checkpoint(arguments["run_dir"], verify=True)
        assert path is not None
        state = load_checkpoint(path, policy, optimizer)
        assert state.prompts == {"cursor": 5}
        assert ShapingState.from_dict(state.shaping) == shaping
    stats = train_step(policy, optimizer, batch, config)  # in place, while the checkpoint is being written
    weights = {name: tensor.clone() for name, tensor in hf_tensors(policy)}
    if parallel.is_stage_leader:
        result: dict[str, Any] = {"stats": stats, "weights": weights}
        torch.save(result, Path(arguments["out"]) / f"stage{parallel.pp_rank}.pt")
    if arguments["action"] == "save":
        checkpointer.wait()
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
