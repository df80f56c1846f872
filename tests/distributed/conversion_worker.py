"""One rank: load converted directories and export them; or save a model as a training run's checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.torch_adam import allocate_state
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.distributed.layouts import worker_config


def main() -> None:
    arguments = json.loads(sys.argv[2])
    config, _ = worker_config("")
    config = replace(config, model=replace(config.model, vocab_divisor=arguments.get("vocab_divisor", 1)))
    parallel = bootstrap.initialize(config.parallel, seed=0)
    for family, path in arguments["models"].items():
        model = _build(config, parallel, path)
        if "run_dir" in arguments:
            policy, optimizer = make_trainable(model, config.optimizer, total_steps=10)
            allocate_state(optimizer.megatron)  # it is saved before its first step
            state = RunState(2, {}, optimizer.schedule.state_dict(), {})
            Checkpointer(arguments["run_dir"], path, config.checkpoint).save(policy, optimizer, state, wait=True)
        else:
            _export(model, Path(arguments["out"]) / f"{family}-{parallel.rank}.pt")
    bootstrap.shutdown()


def _build(config: Config, parallel: ParallelContext, path: str) -> Model:
    return build_model(replace(config, model=replace(config.model, path=path)), parallel, path=path)


def _export(model: Model, file: Path) -> None:
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in hf_tensors(model)}
    for name, parameter in model.chunks[0].named_parameters():
        if name == "embedding.word_embeddings.weight":
            first = parameter.shape[0] * model.parallel.tp_rank
            found["padding"] = parameter.detach()[max(0, model.hf.vocab_size - first) :].clone()
    torch.save(found, file)


if __name__ == "__main__":
    main()
