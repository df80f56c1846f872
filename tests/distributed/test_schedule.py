"""Over 50 steps with random engine failures and kills, each prompt is used exactly once an epoch, in every mode."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.experience.types import Prompt
from tests.distributed.schedule_worker import MODES, PROMPTS, SAMPLES, STEPS
from tests.support.prompt_accounts import check_used_once_an_epoch, used
from tests.support.rank_server import run_ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedule")
    run_ranks("tests.distributed.schedule_worker", [str(path), str(STEPS), "{}"], 2, path)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_each_prompt_is_used_exactly_once_an_epoch(out: Path, mode: str) -> None:
    check_that_the_mode_did_something(mode, check_prompts(out, mode, STEPS))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
def test_all_of_it_works_where_a_replica_is_more_than_its_leader(layout: dict[str, int], tmp_path: Path) -> None:
    run_ranks("tests.distributed.schedule_worker", [str(tmp_path), "8", json.dumps(layout), "all"], 4, tmp_path)
    totals = check_prompts(tmp_path, "all", 8)
    assert totals["rollout/skipped"] > 0 and totals["rollout/deferred"] > 0


def check_prompts(out: Path, mode: str, steps: int) -> dict[str, float]:
    """Metrics of a run, summed over its steps, each of which must have trained on something."""
    result = json.loads((out / "result.json").read_text())[mode]
    found = Counter[int]()
    for step in range(steps):
        trained, skipped = used(out / mode, step, SAMPLES, replicas=2)
        assert trained and len(trained) <= 6
        found.update([*trained, *skipped])
    source = PromptSource([Prompt(i, "", (i, 7), "") for i in range(PROMPTS)], 6, seed=1)
    check_used_once_an_epoch(found, source, result["source"])
    totals: dict[str, float] = result["totals"]
    return totals


def test_every_kind_of_failure_has_come_about(out: Path) -> None:
    logs = "".join(path.read_text() for path in (out / "logs").iterdir())
    for words in ("sampling failed, try 1", "no sign of life", "samples from version", "of 2 asked came back"):
        assert words in logs


def check_that_the_mode_did_something(mode: str, totals: dict[str, float]) -> None:
    if mode == "plain":
        return
    assert totals["rollout/groups"] <= 6 * STEPS
    if "sampling" in mode or mode == "all":
        assert totals["rollout/drawn"] > 7 * STEPS
    if mode in ("over_sampling", "time_budget", "token_budget", "all"):
        assert totals["rollout/deferred"] > 10
    if mode in ("dynamic_sampling", "all"):
        assert totals["rollout/skipped_solved"] > 20 and totals["rollout/skipped_unsolved"] > 20
