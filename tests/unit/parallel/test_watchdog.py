"""The watchdog, with ranks that are small processes of torch and gloo."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.support import watched_rank
from tests.support.watched_rank import DEADLINE_S, Job

SOON_S = 20.0  # on a busy machine; what it bounds takes a few seconds


def first_words(job: Job) -> str:
    return str(job.causes()[0])


def test_a_job_that_ends_well_leaves_no_report_and_waits_for_its_last_rank(tmp_path: Path) -> None:
    with Job(watched_rank.end, 3, tmp_path) as job:
        assert job.codes(within_s=SOON_S) == [0, 0, 0]
        assert job.causes() == []


def test_a_killed_rank_ends_the_others_in_seconds_with_its_name_and_host(tmp_path: Path) -> None:
    with Job(watched_rank.work_on, 4, tmp_path, deadline_s=4 * DEADLINE_S) as job:
        job.wait_ready()
        job.send(2, signal.SIGKILL)
        assert job.codes(0, 1, 3, within_s=SOON_S) == [1, 1, 1]  # not after the whole deadline
        assert first_words(job).startswith("rank 2 on node1: no heartbeat for ")
        assert job.causes()[0].lost_hosts == ()  # rank 3 on node1 lives
        assert (tmp_path / "stderr-0").read_text().splitlines()[-1].startswith("rpp: rank 2 on node1: no heartbeat")


def test_a_suspended_rank_is_lost_and_with_its_last_rank_its_node(tmp_path: Path) -> None:
    with Job(watched_rank.idle, 3, tmp_path) as job:
        job.wait_ready()
        start = time.monotonic()
        job.send(2, signal.SIGSTOP)
        assert job.codes(0, 1, within_s=DEADLINE_S + SOON_S) == [1, 1]
        assert time.monotonic() - start > DEADLINE_S - 1.0  # nothing but the heartbeats can tell
        assert first_words(job).startswith("rank 2 on node1: no heartbeat for ")
        assert job.causes()[0].lost_hosts == ("node1",)
        assert "in idle" in job.log(0) and "in idle" in job.log(1)  # stacks


def test_without_rank_0_and_its_store_the_others_end_at_once(tmp_path: Path) -> None:
    with Job(watched_rank.idle, 3, tmp_path) as job:
        job.wait_ready()
        job.send(0, signal.SIGKILL)
        start = time.monotonic()
        assert job.codes(1, 2, within_s=SOON_S) == [1, 1]
        assert time.monotonic() - start < DEADLINE_S
        assert [each.rank for each in job.causes()] == [0]
        assert first_words(job) == "rank 0 on node0: its process is gone: it has closed the job's store"
        assert job.causes()[0].lost_hosts == ()  # rank 1 on node0 says so


def test_a_suspended_rank_0_whose_store_answers_no_more_is_lost(tmp_path: Path) -> None:
    with Job(watched_rank.idle, 3, tmp_path) as job:
        job.wait_ready()
        job.send(0, signal.SIGSTOP)
        assert job.codes(1, 2, within_s=DEADLINE_S + SOON_S) == [1, 1]
        assert first_words(job).startswith("rank 0 on node0: the job's store at its host does not answer for ")


def test_an_exception_ends_ranks_that_wait_in_a_collective_for_it(tmp_path: Path) -> None:
    with Job(watched_rank.fail_while_others_wait, 3, tmp_path) as job:
        assert job.codes(within_s=SOON_S) == [1, 1, 1]
        assert [(each.rank, each.kind) for each in job.causes()] == [(1, "error")]
        assert first_words(job) == "rank 1 on node0: RuntimeError: boom on purpose"
        assert "in reduce" in job.log(0) and "in reduce" in job.log(2)
        assert "boom on purpose" in (tmp_path / "stderr-1").read_text()  # who raised it ends by itself


def test_a_users_mistake_that_rank_0_does_not_see_is_told_by_rank_0(tmp_path: Path) -> None:
    with Job(watched_rank.refuse, 3, tmp_path) as job:
        assert job.codes(0, within_s=SOON_S) == [2]
        assert "rpp: error: data.train.path must be there\n" in (tmp_path / "stderr-0").read_text()


def test_a_phase_past_its_limit_is_a_stall_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    with Job(watched_rank.hang_in_a_phase, 3, tmp_path, stall_s=2.0) as job:
        assert job.codes(within_s=SOON_S) == [1, 1, 1]
        assert job.causes()[0].kind == "stall" and "the phase train has taken 2 s" in first_words(job)
        assert "in hang_in_a_phase" in job.log(0)
        assert "in reduce" in job.log(1) and "in reduce" in job.log(2)


def test_a_rank_that_is_slow_but_alive_is_not_accused(tmp_path: Path) -> None:
    with Job(watched_rank.be_slow, 3, tmp_path, deadline_s=2.5) as job:
        assert job.codes(within_s=5 + SOON_S) == [0, 0, 0]
        assert job.causes() == []


def test_a_rank_stuck_with_the_interpreters_lock_is_lost_and_shows_where(tmp_path: Path) -> None:
    with Job(watched_rank.hold_the_gil, 3, tmp_path) as job:
        job.wait_ready()
        assert job.codes(0, 2, within_s=DEADLINE_S + SOON_S) == [1, 1]
        assert first_words(job).startswith("rank 1 on node0: no heartbeat for ")
        assert job.causes()[0].lost_hosts == ()
        assert "in hold_the_gil" in job.log(1)


def test_a_request_to_stop_on_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    with Job(watched_rank.step_until_asked, 3, tmp_path) as job:
        job.wait_ready()
        job.send(1, signal.SIGUSR1)
        job.send(1, signal.SIGUSR1)  # the second changes nothing
        assert job.codes(within_s=SOON_S) == [0, 0, 0]
        assert len({(tmp_path / f"stopped-{rank}").read_text() for rank in range(3)}) == 1
