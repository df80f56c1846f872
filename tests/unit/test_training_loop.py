"""The loop of `rpp train` around its steps, with stand-ins for all that a step does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest

from megatron_rpp import train
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import ShapingState
from megatron_rpp.parallel import own_failure
from megatron_rpp.parallel.exit_codes import TakenOver
from megatron_rpp.session import Session


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    monkeypatch.setattr(own_failure, "_has_begun", False)
    session = MagicMock()
    session.first_step, session.config = 0, Config()

    @contextmanager
    def opened(config: Config, *, resume: str) -> Iterator[MagicMock]:
        yield session

    monkeypatch.setattr(train, "open_session", opened)
    names = (
        "collate",
        "collect",
        "evaluate",
        "from_replica_leader",
        "greedy_rewards",
        "score",
        "step_metrics",
        "train_step",
    )
    for name in names:
        monkeypatch.setattr(train, name, MagicMock())
    monkeypatch.setattr(train, "balance", lambda share, *_: (share, {}))
    monkeypatch.setattr(train, "add_advantages", lambda batch, config, parallel, shaping: (batch, shaping, {}))
    return session


def test_a_value_error_of_a_step_does_not_end_a_run_for_good(session: MagicMock) -> None:
    train.collect.side_effect = ValueError("what a library says")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="what a library says") as caught:
        train.run(Config(), resume="no")
    assert own_failure.failure_of(caught.value, 0, "a").exit_code == 1


def test_a_job_that_was_replaced_writes_no_metrics(session: MagicMock) -> None:
    session.checkpointer.check_fence.side_effect = TakenOver("another job has taken over")
    with pytest.raises(TakenOver):
        train.run(Config(), resume="no")
    session.rollout_engine.sync.assert_called_once()  # it came to the end of its step
    session.reporter.step.assert_not_called()
    session.save.assert_not_called()


def test_servers_wake_only_when_the_trainer_has_left_their_gpus(session: MagicMock) -> None:
    done: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        done.append(name)
        yield
        done.append(f"end of {name}")

    session.offload.scoring, session.offload.training = lambda: noted("scoring"), lambda: noted("training")
    session.parity.ask_while_awake.side_effect = lambda rollouts: done.append("ask servers")
    session.rollout_engine.release_memory.side_effect = lambda: done.append("servers sleep")
    session.rollout_engine.sync.side_effect = lambda policy_version: done.append("sync")
    train.score.side_effect = lambda *_: done.append("score")  # type: ignore[attr-defined]
    train.train_step.side_effect = lambda *_: done.append("train") or {}  # type: ignore[attr-defined]
    train.train_on_one_batch(session, 0)
    scored = ["ask servers", "servers sleep", "scoring", "score", "end of scoring"]
    assert done == [*scored, "training", "train", "end of training", "sync"]


@pytest.mark.parametrize("moves_optimizer", [True, False])
def test_a_checkpoint_has_the_optimizer_back_in_room_that_servers_have_left(
    session: MagicMock, moves_optimizer: bool
) -> None:
    done: list[str] = []

    @contextmanager
    def noted(name: str, begin: str, end: str) -> Iterator[None]:
        done.append(begin.format(name))
        yield
        done.append(end.format(name))

    session.phase = lambda name: noted(name, "phase {}", "end of {}")
    session.shaping = ShapingState()
    session.offload.saving = lambda: noted("optimizer", "{} back", "{} away")
    session.offload.moves_optimizer = moves_optimizer
    session.rollout_engine.release_memory.side_effect = lambda: done.append("servers sleep")
    session.checkpointer.save.side_effect = lambda *_, **options: done.append("save")
    Session.save(session, 1)
    saved = [*["servers sleep"] * moves_optimizer, "optimizer back", "save", "optimizer away"]
    assert done == ["phase save", *saved, "end of save"], "its memory is the most of a run, and must be in a phase"
