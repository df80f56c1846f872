from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.observability.logs import append_log, log_path, setup_logging, tail
from megatron_rpp.observability.report import draw, summary
from megatron_rpp.observability.rollouts import write_rollouts
from megatron_rpp.observability.writers import MetricsWriter, metrics_path, read_metrics


def writer(run_dir: Path, resume_step: int = 0) -> MetricsWriter:
    return MetricsWriter(run_dir, resume_step, tensorboard=False)


def test_a_step_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    metrics = writer(tmp_path / "run")
    metrics.write(0, {"reward/mean": 0.5})
    assert metrics_path(tmp_path / "run").read_text() == '{"step": 0, "reward/mean": 0.5}\n'


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in range(4):
            metrics.write(step, {"x": 1.0})
    with metrics_path(tmp_path).open("a") as file:
        file.write('{"step": 4, "x"')  # killed in the middle of a write
    with writer(tmp_path, resume_step=2) as metrics:
        metrics.write(2, {"x": 2.0})
    assert [(r["step"], r["x"]) for r in read_metrics(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_with_its_key_and_not_written(tmp_path: Path, value: float) -> None:
    with writer(tmp_path) as metrics, pytest.raises(RuntimeError, match="step 3: kl/mean is"):
        metrics.write(3, {"reward/mean": 0.0, "kl/mean": value})
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as metrics:
        metrics.write(5, {"reward/mean": 0.25})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(5, 0.25)]


@dataclass(frozen=True)
class FakePrompt:
    id: int = 7
    text: str = "1+1="
    answer: str = "2"
    source: str = "sums"


@dataclass(frozen=True)
class FakeRollout:
    text: str
    prompt: FakePrompt = FakePrompt()
    group_id: int = 3
    response_ids: tuple[int, ...] = (1, 2)
    finish_reason: str = "stop"
    policy_version: int = 4
    version_spans: tuple[tuple[int, int, int], ...] = ((3, 0, 1), (4, 1, 2))


def test_rollouts_are_one_object_a_response_and_a_repeated_step_replaces_them(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [FakeRollout("x"), FakeRollout("y")], [0.0, 1.0])
    path = write_rollouts(tmp_path, 1, [FakeRollout("é\n2")], [1.0])
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted: dict[str, Any] = {
        "prompt_id": 7,
        "source": "sums",
        "group_id": 3,
        "prompt": "1+1=",
        "answer": "2",
        "response": "é\n2",
    }
    wanted |= {"response_tokens": 2, "finish_reason": "stop", "policy_version": 4, "reward": 1.0}
    wanted["version_spans"] = [[3, 0, 1], [4, 1, 2]]
    assert records == [wanted]
    assert path == tmp_path / "rollouts" / "step-1.jsonl" and list(path.parent.iterdir()) == [path]


def test_a_reward_is_required_for_each_rollout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_rollouts(tmp_path, 0, [FakeRollout("x")], [])


def test_logs_go_to_the_ranks_file_and_only_rank_0_warns_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (1, 0):
        logger = setup_logging(tmp_path, rank)
        logger.info("quiet %d", rank)
        logger.warning("loud %d", rank)
    append_log(tmp_path, 1, "Traceback\n")
    assert [line.split(": ")[-1] for line in tail(log_path(tmp_path, 1), 20)] == [
        "quiet 1",
        "loud 1",
        "Traceback",
    ]
    assert tail(log_path(tmp_path, 0), 1)[0].endswith("rank 0 WARNING megatron_rpp: loud 0")
    shown = capsys.readouterr().err
    assert "loud 0" in shown and "loud 1" not in shown and "quiet" not in shown
    assert tail(tmp_path / "absent", 3) == []


def test_the_report_draws_a_picture_and_says_first_and_last_accuracy(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(0, {"reward/mean": 0.1, "eval/accuracy": 0.25, "eval/greedy_accuracy": 0.3, "kl/mean": 0.0})
        metrics.write(1, {"reward/mean": 0.2, "kl/mean": 0.1})
        metrics.write(2, {"reward/mean": 0.3, "eval/accuracy": 0.75, "eval/greedy_accuracy": 0.8, "kl/mean": 0.2})
    picture = draw(tmp_path)
    assert picture == tmp_path / "curve.png" and picture.read_bytes().startswith(b"\x89PNG")
    assert summary(tmp_path) == (
        "3 steps; held-out accuracy 25.0% (step 0) -> 75.0% (step 2), +50.0 points; "
        "greedy accuracy 30.0% (step 0) -> 80.0% (step 2), +50.0 points"
    )


def test_the_report_names_each_held_out_set(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(0, {"eval/aime/accuracy": 0.25, "eval/aime/pass@8": 0.5, "eval/essays/reward": -1.0})
        metrics.write(1, {"eval/aime/accuracy": 0.5, "eval/aime/pass@8": 0.5, "eval/essays/reward": 1.5})
    assert draw(tmp_path).exists()
    assert summary(tmp_path) == (
        "2 steps; held-out accuracy of aime 25.0% (step 0) -> 50.0% (step 1), +25.0 points; "
        "held-out reward of essays -1.000 (step 0) -> 1.500 (step 1)"
    )


def test_a_directory_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no steps; give the run\.dir of a run that has trained"):
        summary(tmp_path)
