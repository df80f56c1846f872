"""A run's checkpoints on a disk that fills up, loses bytes, or is shared with a job that should be dead."""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rpp.checkpoint import manager
from megatron_rpp.checkpoint.fence import Fence
from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.folders import latest_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.rng import restore_rng, rng_file
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.job import CheckpointConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, TrainConfig
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.exit_codes import TakenOver
from tests.distributed.invariance_worker import fixed_batch
from tests.support.tiny_models import save_tiny


class Trainer:
    """A one-rank job with a tiny policy that can take steps."""

    def __init__(self, model: Path) -> None:
        self.source = model
        self.config = Config(
            model=ModelConfig(path=str(model)),
            train=TrainConfig(batch_size=8, micro_batch_size=8),
            optimizer=OptimizerConfig(lr=1e-2),
        )
        self.parallel = bootstrap.initialize(self.config.parallel, seed=0)
        built = build_model(self.config, self.parallel, path=str(model))
        self.policy, self.optimizer = make_trainable(built, self.config.optimizer, total_steps=100)
        self.batch, _, _ = add_advantages(fixed_batch(), self.config, self.parallel, ShapingState())
        self.step()  # so that there are moments

    def step(self) -> None:
        train_step(self.policy, self.optimizer, self.batch, self.config)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for chunk in self.policy.chunks for p in chunk.parameters()]

    def checkpointer(self, run_dir: Path, **options: Any) -> Checkpointer:
        fence = options.pop("fence", None)
        return Checkpointer(run_dir, self.source, CheckpointConfig(**options), fence=fence)

    def save(self, checkpointer: Checkpointer, step: int) -> None:
        checkpointer.save(self.policy, self.optimizer, RunState(step, {}, self.optimizer.schedule.state_dict()))

    def load(self, path: Path) -> RunState:
        return load_checkpoint(path, self.policy, self.optimizer)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    root = tmp_path_factory.mktemp("model")
    save_tiny("llama", root)
    yield Trainer(root / "llama")
    bootstrap.shutdown()


@pytest.fixture(scope="module")
def two_steps(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("run")
    checkpointer = trainer.checkpointer(run_dir, background=False)
    for step in (1, 2):
        trainer.save(checkpointer, step)
    return run_dir


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_checkpoint_in_the_background_holds_its_own_step(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    real = manager.write_snapshot
    monkeypatch.setattr(manager, "write_snapshot", lambda *a: (go_on.wait(60), real(*a))[1])
    checkpointer = trainer.checkpointer(tmp_path)
    saved = trainer.weights()
    trainer.save(checkpointer, 1)
    for _ in range(2):
        trainer.step()  # changes weights and moments in place, before anything is written
        checkpointer.poll()
    assert latest_checkpoint(tmp_path) is None, "it counts before it is whole"
    moved = trainer.weights()
    go_on.set()
    checkpointer.wait()
    path = latest_checkpoint(tmp_path)
    assert path is not None
    trainer.load(path)
    assert all(torch.equal(a, b) for a, b in zip(trainer.weights(), saved, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(moved, saved, strict=True)), "the steps changed nothing"
    trainer.step()
    trainer.step()  # needs the moments of the saved step
    assert all(torch.equal(a, b) for a, b in zip(trainer.weights(), moved, strict=True)), "moments of another step"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("__0_0.distcp", flip_a_bit),
        ("__0_0.distcp", truncate),
        ("__0_0.distcp", Path.unlink),
        ("run_state.json", flip_a_bit),
        ("rng-00000.pt", Path.unlink),
    ],
)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Callable[[Path], object]
) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-000002"
    harm(newest / name)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(tmp_path, verify=True)
    assert found == tmp_path / "checkpoints" / "step-000001"
    assert str(newest / name) in caplog.text, "the warning must name the file"


def test_damaged_manifest_is_damage(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / "step-000002" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"


def test_run_whose_checkpoints_are_all_damaged_does_not_start_over(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/common.pt"):
        flip_a_bit(path)
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(ValueError, match="every checkpoint"):
            find_checkpoint(tmp_path, verify=True)


def test_damaged_checkpoint_is_written_anew_and_then_deleted(trainer: Trainer, two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "checkpoints" / "step-000002" / ".metadata")
    find_checkpoint(tmp_path, verify=True)
    assert len(names(tmp_path)) == 2, "the damaged one was deleted while it was the second"
    trainer.save(trainer.checkpointer(tmp_path, background=False), 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert find_checkpoint(tmp_path, verify=True) == tmp_path / "checkpoints" / "step-000002"


def test_checkpoint_of_an_older_version_is_taken_with_a_word_in_the_log(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-000002"
    (newest / "manifest.json").unlink()
    (newest / rng_file(0)).unlink()
    with caplog.at_level(logging.INFO):
        assert find_checkpoint(tmp_path, verify=True) == newest
        restore_rng(newest, is_same_layout=False, seed=1, step=2)
    assert "an older version wrote it" in caplog.text and "seeded anew" in caplog.text


def test_newest_and_every_third_are_kept(trainer: Trainer, tmp_path: Path) -> None:
    checkpointer = trainer.checkpointer(tmp_path, keep=2, keep_every=3, background=False)
    (tmp_path / "checkpoints" / "step-000001.0a.partial").mkdir(parents=True)
    for step in range(1, 9):
        trainer.save(checkpointer, step)
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000007", "step-000008"]


def test_whole_checkpoint_is_not_written_twice(trainer: Trainer, tmp_path: Path) -> None:
    checkpointer = trainer.checkpointer(tmp_path)
    trainer.save(checkpointer, 4)
    checkpointer.wait()
    manifest = tmp_path / "checkpoints" / "step-000004" / "manifest.json"
    before = manifest.stat()
    trainer.save(checkpointer, 4)
    checkpointer.wait()
    after = manifest.stat()  # not its access time: the second save reads it
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_whole_checkpoint_is_replaced_where_that_is_asked(trainer: Trainer, tmp_path: Path) -> None:
    """A step that ended without any group to train on has used up prompts since."""
    checkpointer, schedule = trainer.checkpointer(tmp_path, background=False), trainer.optimizer.schedule.state_dict()
    for served in (8, 32):
        state = RunState(4, {"served": served}, schedule)
        checkpointer.save(trainer.policy, trainer.optimizer, state, wait=True, replace=served == 32)
    path = find_checkpoint(tmp_path, verify=True)
    assert path is not None and trainer.load(path).prompts == {"served": 32}
    assert names(tmp_path) == ["step-000004"]


def test_full_disk_is_told_with_file_and_reason_and_leaves_the_last_checkpoint(
    trainer: Trainer, two_steps: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    checkpointer = trainer.checkpointer(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # no file may become larger
    try:
        trainer.save(checkpointer, 3)
        with pytest.raises(OSError, match=r"step-000003.*__0_0\.distcp.*File too large"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(tmp_path, verify=True) == tmp_path / "checkpoints" / "step-000002"
    trainer.save(checkpointer, 3)  # there is room again
    checkpointer.wait()
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_job_that_was_replaced_writes_no_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    ours = Fence(tmp_path, "12.0")
    ours.claim()
    checkpointer = trainer.checkpointer(tmp_path, fence=ours)
    trainer.save(checkpointer, 1)
    checkpointer.wait()
    Fence(tmp_path, "12.1").claim()
    trainer.save(checkpointer, 2)
    with pytest.raises(TakenOver, match=r"another job has taken over run\.dir=.*'12\.1'.*'12\.0'"):
        checkpointer.wait()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(TakenOver, match=r"another job has taken over run\.dir=.*'12\.1'.*'12\.0'"):
        checkpointer.check_fence()
    assert json.loads((tmp_path / "attempt").read_text())["attempt"] == "12.1"


def draws() -> list[float]:
    """A number of each generator."""
    with get_cuda_rng_tracker().fork():
        of_megatron = torch.rand(1).item()
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), of_megatron]


def test_every_generator_goes_on_where_it_was(trainer: Trainer, tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn()  # each keeps a second number back
    trainer.save(trainer.checkpointer(tmp_path, background=False), 5)
    path, expected = latest_checkpoint(tmp_path), draws()
    assert path is not None
    draws()
    restore_rng(path, is_same_layout=True, seed=0, step=5)
    assert draws() == expected
    restore_rng(path, is_same_layout=False, seed=0, step=5)
    elsewhere = draws()
    assert not set(elsewhere) & set(expected), "at another layout the ranks' numbers must be new"
    restore_rng(path, is_same_layout=False, seed=0, step=5)
    assert draws() == elsewhere, "and the same each time"
