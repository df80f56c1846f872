"""Syncs that are disturbed end with a verified version on every live server, or with an error that names the cause.

Real servers, a real trainer. One job runs all faults that leave it alive, one after the other; each test
reads what came of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.parallel.local_launch import launch_local
from tests.integration.test_loop import read_rollouts, write_problems

DEADLINE_S = 8.0
HEALTH_S = 6.0
# What a sync may take that fails once: a phase up to its deadline, the clean-up, the look at the suspects, the retry.
LIMIT_S = 3 * DEADLINE_S + 2 * HEALTH_S + 10

FAULTS = (
    "undisturbed",
    "by_ipc",
    "corrupted",
    "disk_full_then_broadcast",
    "disk_full_only",
    "rejoined",
    "skewed",
    "other_version",
    "killed_before",
    "rejoined",
    "killed_at_join",
    "rejoined",
    "killed_during",
    "rejoined",
    "killed_after",
    "rejoined",
    "thirty_steps",
)

SPLIT_FAULTS = ("rank_1_comes_late", "checksum_fails", "stopped_during", "rank_1_stays_away")  # on TP2


def write_config(root: Path, model: Path, *, servers: int, tensor: int) -> Path:
    write_problems(root / "problems.jsonl", 40)
    write_problems(root / "eval.jsonl", 6)
    path = root / "run.toml"
    path.write_text(
        f"""
run = {{ dir = "{root / "run"}", steps = 100, seed = 5 }}
model = {{ path = "{model}" }}
parallel = {{ tensor = {tensor} }}
algorithm = {{ num_samples_per_prompt = 8 }}
train = {{ batch_size = 80, micro_batch_size = 20 }}
eval = {{ num_prompts = 6, interval = 1000 }}
checkpoint = {{ interval = 0 }}
weight_sync = {{ deadline_s = {DEADLINE_S} }}
[rollout]
num_servers = {servers}
num_prompts = 20
max_response_tokens = 2
context_length = 32
health_deadline_s = {HEALTH_S}
restart_backoff_s = 0.1
record = "off"  # else responses that a version has already given would not be sampled again
[data]
train = {{ kind = "jsonl", path = "{root}/problems.jsonl", size = 40 }}
evals.sums = {{ kind = "jsonl", path = "{root}/eval.jsonl" }}
"""
    )
    return path


@pytest.fixture(scope="module")
def found(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of each of FAULTS, in one job with two servers, whose disk holds less than the weights."""
    root = tmp_path_factory.mktemp("faults")
    disk = root / "disk"
    disk.mkdir()
    config = write_config(root, tiny_model_dir, servers=2, tensor=1)
    worker = f"{sys.executable} -m tests.integration.fault_worker {config} {root} {' '.join(FAULTS)}"
    script = f"mount -t tmpfs -o size=100k none {disk} && exec {worker}"
    with (root / "out.txt").open("w") as log:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], stdout=log, stderr=log, timeout=900)
    assert done.returncode == 0, (root / "out.txt").read_text()[-3000:]
    return json.loads((root / "result.json").read_text())


@pytest.fixture
def run_dir(found: list[dict[str, Any]]) -> Path:
    """Of the job of `found`."""
    return Path(found[0]["run_dir"])


def of(found: list[dict[str, Any]], fault: str) -> dict[str, Any]:
    return found[FAULTS.index(fault)]


def assert_verified(result: dict[str, Any], servers: int) -> None:
    """Every live server holds, bit for bit, and names, the version of the policy, and samples with it."""
    assert "error" not in result, result.get("error")
    assert result["differences"] == []
    assert result["servers"] == servers
    assert result["answering"] == [str(result["version"])] * servers
    assert result["sampled_by"] == [result["version"]]
    assert result["sampled"] == result["asked"] > 0


def test_both_servers_hold_a_version_that_nothing_disturbed(found: list[dict[str, Any]]) -> None:
    assert_verified(of(found, "undisturbed"), servers=2)
    assert of(found, "undisturbed")["transport"] == "broadcast"


def test_servers_read_what_the_ipc_transport_posts(found: list[dict[str, Any]]) -> None:
    assert_verified(of(found, "by_ipc"), servers=2)
    assert of(found, "by_ipc")["transport"] == "ipc"


@pytest.mark.parametrize("when", ["before", "at_join", "during", "after"])
def test_a_server_killed_in_a_sync_leaves_the_other_with_a_verified_version(
    found: list[dict[str, Any]], when: str
) -> None:
    result = of(found, f"killed_{when}")
    assert_verified(result, servers=1)
    assert result["seconds"] < LIMIT_S
    assert result["transport"] == "disk", "the broadcast cannot have ended well"
    where = {"before": "phase begin", "at_join": "joining the weight-update group", "after": "phase commit"}
    assert any(where.get(when, "phase send") in warning for warning in result["warnings"])
    assert len({*result["pids_before"]} & {*result["pids"]}) == 1, "the other was started again, too, rather than freed"


def test_killed_servers_come_back_with_the_current_version(found: list[dict[str, Any]]) -> None:
    for fault, result in zip(FAULTS, found, strict=True):
        if fault == "rejoined":
            assert_verified(result, servers=2)


def test_one_flipped_bit_in_flight_is_found_and_the_next_transport_mends_it(found: list[dict[str, Any]]) -> None:
    assert_verified(of(found, "corrupted"), servers=2)
    assert of(found, "corrupted")["transport"] == "disk"
    warning = next(w for w in of(found, "corrupted")["warnings"] if "phase verify" in w)
    assert "model." in warning and "http://" in warning and "rank 0" in warning, warning


def test_a_server_of_another_version_than_it_was_brought_to_is_named_and_synced(found: list[dict[str, Any]]) -> None:
    result = of(found, "skewed")
    assert_verified(result, servers=2)
    assert result["transport"] == "disk"
    warning = next(w for w in result["warnings"] if "phase begin" in w)
    assert "http://" in warning and "answers as version 77" in warning, warning


def test_a_full_disk_is_named_and_the_next_transport_takes_over(found: list[dict[str, Any]]) -> None:
    assert_verified(of(found, "disk_full_then_broadcast"), servers=2)
    assert of(found, "disk_full_then_broadcast")["transport"] == "broadcast"


def test_a_full_disk_without_another_transport_is_a_named_error(found: list[dict[str, Any]]) -> None:
    result = of(found, "disk_full_only")
    assert "No space left on device" in result["error"] and "phase send" in result["error"]
    assert result["seconds"] < LIMIT_S


def test_samples_of_another_version_are_asked_again_from_synced_servers(found: list[dict[str, Any]]) -> None:
    result = of(found, "other_version")
    assert_verified(result, servers=2)
    assert result["sampled_then"] == [result["version"]]
    assert any("samples from version 77" in warning for warning in result["warnings"])


def test_thirty_steps_lose_no_prompt_while_servers_die_at_random(found: list[dict[str, Any]], run_dir: Path) -> None:
    result = of(found, "thirty_steps")
    steps = range(result["first"], result["version"])
    assert len(steps) >= 30
    metrics = {step["step"]: step for step in read_metrics(run_dir)}
    assert list(metrics) == list(steps)
    assert max(step["mismatch/logprob_abs_max"] for step in metrics.values()) < 1e-3, "of the trainer's own weights"
    kills = result["kills"]
    assert len(kills) >= 4 and {kill["phase"] for kill in kills} >= {"rollout", "sync"}
    for kill in kills:
        assert kill["served"] > 0 and metrics[kill["step"] - 1]["sync/servers"] == 2, "nothing was disturbed"
    for step in steps:
        rollouts = read_rollouts(run_dir, step)
        assert {span[0] for r in rollouts for span in r["version_spans"]} == {step}
        samples = Counter(r["prompt_id"] for r in rollouts)
        assert len(samples) == 20 and set(samples.values()) == {8}
        if (step - steps.start) % 2:  # 40 problems: every two steps see each once
            assert not samples.keys() & Counter(r["prompt_id"] for r in read_rollouts(run_dir, step - 1)).keys()


@pytest.fixture(scope="module")
def split(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """TP2; what rank 0 saw."""
    root = tmp_path_factory.mktemp("late")
    config = write_config(root, tiny_model_dir, servers=2, tensor=2)
    argv = [sys.executable, "-m", "tests.integration.fault_worker", str(config), str(root)]
    launch_local([*argv, *SPLIT_FAULTS], 2, root / "run")
    return json.loads((root / "result.json").read_text())


def test_a_rank_that_comes_late_but_in_time_delays_a_sync_only(split: list[dict[str, Any]]) -> None:
    assert_verified(split[0], servers=2)


def test_an_error_of_one_rank_leaves_the_others_in_step(split: list[dict[str, Any]]) -> None:
    result = split[1]
    assert_verified(result, servers=2)
    assert result["seconds"] < DEADLINE_S, "the others waited for a rank that had failed"
    assert any("phase send, rank 0: planted" in warning for warning in result["warnings"])


def test_a_hung_server_is_given_up_within_the_deadline_and_costs_no_group_of_ranks(split: list[dict[str, Any]]) -> None:
    """The leader waits for the server while the other rank waits for the leader's next gather."""
    result = split[2]
    assert_verified(result, servers=1)
    assert result["seconds"] < LIMIT_S
    assert any("phase send" in warning and "was not taken" in warning for warning in result["warnings"])


def test_a_rank_that_stays_away_is_named_soon_after_the_deadline(split: list[dict[str, Any]]) -> None:
    result = split[3]
    assert result["kind"] == "OutOfStepError"
    assert "phase send" in result["error"] and "rank 1 did not answer" in result["error"]
    assert result["seconds"] < 2 * DEADLINE_S + 10


def test_no_server_outlives_the_jobs(found: list[dict[str, Any]], split: list[dict[str, Any]]) -> None:
    for pid in [pid for result in (*found, *split) for pid in result.get("pids", [])]:
        assert not os.path.exists(f"/proc/{pid}")
