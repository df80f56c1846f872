"""Kills two ranks at seeded points of a checkpoint's writing, again and again; the next ones go on from what is left.

    python -m tests.distributed.checkpoint_kill_worker MODEL OUT KILLS

OUT/undisturbed.txt and OUT/killed.txt get a line for each state that a rank had: rank, step, digest.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch

from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.checkpoint.torch_adam import _torch_adams
from megatron_rpp.config.job import CheckpointConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap
from tests.distributed.invariance_worker import own_rows
from tests.support.forked_ranks import run_forked

_WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


class FileEvents:
    """Counts what this process does to files under `root`, and dies at one of these events, or soon after."""

    def __init__(self, root: Path) -> None:
        self._root, self.count, self._fatal, self._delay_s = str(root), 0, -1, 0.0
        sys.addaudithook(self._on_event)

    def die_at(self, event: int, delay_s: float) -> None:
        self.count, self._fatal, self._delay_s = 0, event, delay_s

    def _on_event(self, name: str, arguments: tuple[object, ...]) -> None:
        # Names of what is deleted in a folder are relative to it.
        if name in _WRITES and (name in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(self._root)):
            self.count += 1
            if self.count == self._fatal:
                if not self._delay_s:
                    _die()
                threading.Timer(self._delay_s, _die).start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def steps(model: str, run_dir: Path, notes: Path, last: int, doom: tuple[int, int, float] | None) -> None:
    """Go on from the newest checkpoint up to `last`, with a checkpoint of every step.

    doom: (the rank that dies, at which file event of its first checkpoint, seconds later); None: nobody dies, and
    the events of the last checkpoint are noted.
    """
    events = FileEvents(run_dir)
    config = Config(
        model=ModelConfig(path=model),
        parallel=ParallelConfig(data=2),
        train=TrainConfig(batch_size=8, micro_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    parallel = bootstrap.initialize(config.parallel, seed=0)
    policy, optimizer = make_trainable(build_model(config, parallel, path=model), config.optimizer, total_steps=100)
    batch, _, _ = add_advantages(own_rows(parallel), config, parallel, ShapingState())
    checkpointer = Checkpointer(run_dir, model, CheckpointConfig(keep=1))
    first, path = 0, find_checkpoint(run_dir, verify=True)
    if path is not None:
        first = load_checkpoint(path, policy, optimizer).step
    _note(notes, parallel.rank, first, digest(policy, optimizer))
    for step in range(first, last):
        train_step(policy, optimizer, batch, config)
        if doom is None:
            _note(notes, parallel.rank, step + 1, digest(policy, optimizer))
        elif parallel.rank == doom[0]:
            events.die_at(*doom[1:])
        events.count = 0
        checkpointer.save(policy, optimizer, RunState(step + 1, {}, optimizer.schedule.state_dict()))
        checkpointer.wait()
        if doom is not None:
            time.sleep(doom[2])  # its death may still be on its way
            _die()
    if doom is None:
        (notes.parent / f"events-{parallel.rank}.txt").write_text(str(events.count))


def digest(policy: Model, optimizer: Optimizer) -> str:
    """Of this rank's weights, moments, step counts and schedule."""
    found = hashlib.sha256(str(optimizer.schedule.state_dict()).encode())
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    states = [
        adam.state[p] for adam in _torch_adams(optimizer.megatron) for g in adam.param_groups for p in g["params"]
    ]
    moments = [state[key] for state in states for key in ("step", "exp_avg", "exp_avg_sq") if key in state]
    for tensor in (*parameters, *moments):
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def _note(notes: Path, rank: int, step: int, found: str) -> None:
    with notes.open("a") as file:
        file.write(f"{rank} {step} {found}\n")


def main() -> None:
    model, out, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    go = partial(steps, model)
    codes = run_forked(2, partial(go, out / "undisturbed", out / "undisturbed.txt", kills, None), out / "logs")
    assert codes == [0, 0], f"the undisturbed run ended with {codes}"
    events = [int((out / f"events-{rank}.txt").read_text()) for rank in (0, 1)]
    seeded = random.Random(11)
    for _ in range(kills):
        rank = seeded.choice([0, 0, 1])  # rank 0 does more
        doom = (rank, seeded.randint(1, events[rank]), seeded.choice([0.0, 0.002, 0.005]))
        codes = run_forked(2, partial(go, out / "killed", out / "killed.txt", kills + 1, doom), out / "logs")
        assert codes[rank] == -signal.SIGKILL, f"rank {rank} ended with {codes[rank]}"
    go_on = partial(go, out / "killed", out / "killed.txt", 0, None)  # loads what the last one left, and no more
    assert run_forked(2, go_on, out / "logs") == [0, 0]


if __name__ == "__main__":
    main()
