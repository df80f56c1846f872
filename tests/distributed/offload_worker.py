"""One rank of several layouts in turn: the same steps with memory.offload and without, compared."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.fields import build
from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.offload import Offload
from megatron_rpp.engine.optimizer import Optimizer, chained_parts, make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.distributed.invariance_worker import own_rows
from tests.support.layouts_in_turn import take_layout

ALL = ("optimizer", "gradients", "reference")
BLOCK_BYTES = 1000  # so that parameters begin in one and end in another


@dataclass
class Run:
    """One rank's parts of a run."""

    config: Config
    policy: Model
    optimizer: Optimizer
    reference: Model
    offload: Offload

    def step(self) -> dict[str, float]:
        """As train.py does it."""
        with self.offload.scoring():
            batch = score(own_rows(self.policy.parallel), self.policy, self.reference, self.config)
        batch, _, _ = add_advantages(batch, self.config, self.policy.parallel, ShapingState())
        with self.offload.training():
            return train_step(self.policy, self.optimizer, batch, self.config)


def start(config: Config, parallel: ParallelContext, offload: tuple[str, ...]) -> Run:
    policy = build_model(config, parallel, path=config.model.path)
    policy, optimizer = make_trainable(policy, config.optimizer, total_steps=10)
    reference = build_model(config, parallel, path=config.model.path)
    memory = MemoryConfig(offload=offload)
    moved = Offload(memory, policy, optimizer, reference, block_bytes=BLOCK_BYTES)
    return Run(config, policy, optimizer, reference, moved)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(model)}


def steps(run: Run, count: int) -> list[dict[str, float]]:
    """Of which every one begins with all put away, and ends so."""
    found = []
    for _ in range(count):
        run.offload.put_away()
        found.append(run.step())
    return found


def case(config: Config, parallel: ParallelContext, folder: Path) -> dict[str, Any]:
    """What is compared, and what is left on the device while servers would sample."""
    plain = start(config, parallel, ())
    expected, weights_plain = steps(plain, 3), weights(plain.policy)
    moved = start(config, parallel, ALL)
    stats = steps(moved, 2)
    left = {name: device_bytes(moved, name) for name in ALL}
    exported = weights(moved.policy)  # as a weight sync reads them, with the rest away
    save(moved, folder)
    left_after_save = {name: device_bytes(moved, name) for name in ALL}
    host_bytes, kept = moved.offload.host_bytes, device_bytes(plain, "optimizer")
    stats += steps(moved, 1)
    resumed = start(config, parallel, ALL)
    load_checkpoint(folder / "checkpoints" / "step-000002", resumed.policy, resumed.optimizer)
    resumed_weights = weights(resumed.policy)
    stats_resumed = steps(resumed, 1)
    return {
        "stats": stats == expected,
        "weights": same(weights(moved.policy), weights_plain),
        "left": left,
        "left_after_save": left_after_save,
        "host_bytes": host_bytes,
        "optimizer_bytes": kept,
        "reference_bytes": device_bytes(plain, "reference"),
        "loaded": same(resumed_weights, exported),
        "resumed": stats_resumed == expected[2:] and same(weights(resumed.policy), weights_plain),
    }


def save(run: Run, folder: Path) -> None:
    """As session.py does it: with everything away."""
    config = replace(run.config.checkpoint, background=False)
    checkpointer = Checkpointer(folder, run.config.model.path, config)
    state = RunState(2, {}, run.optimizer.schedule.state_dict())
    with run.offload.saving():
        checkpointer.save(run.policy, run.optimizer, state)


def device_bytes(run: Run, name: str) -> int:
    """Of the storages that are the optimizer's, the gradients' or the reference's own; told apart from `Offload`."""
    own = {p.untyped_storage().data_ptr() for chunk in run.policy.chunks for p in chunk.parameters()}
    parts = chained_parts(run.optimizer.megatron)
    adams = [part.optimizer for part in parts]
    tensors: dict[str, list[Tensor]] = {
        "optimizer": [
            *(p for adam in adams for group in adam.param_groups for p in group["params"]),
            *(x for adam in adams for state in adam.state.values() for x in state.values() if x.dim()),
        ],
        "gradients": [p.main_grad for chunk in run.policy.chunks for p in chunk.parameters()],  # type: ignore[attr-defined]
        "reference": [p for chunk in run.reference.chunks for p in chunk.parameters()],
    }
    found = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors[name])}
    return sum(size for place, size in found.items() if place not in own)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def main() -> None:
    jobs: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    out, first = Path(sys.argv[2]), None
    for name, settings in jobs.items():
        config = build(settings)
        parallel = take_layout(name, config.parallel, first)
        first = first or parallel
        found = case(config, parallel, out / name)
        (out / f"{name}-{parallel.rank}.json").write_text(json.dumps(found))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
