"""Reports of what ended a job, and which of them is the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel import own_failure
from megatron_rpp.parallel.exchange import RanksMissing
from megatron_rpp.parallel.exit_codes import TakenOver
from megatron_rpp.parallel.failures import Failure, causes, folder, lines, report
from megatron_rpp.parallel.heartbeats import DONE, RUNS, Beat, Judge, lost_hosts
from megatron_rpp.parallel.own_failure import failure_of


def failure(rank: int, kind: str, time: float = 0.0, lost: tuple[str, ...] = ()) -> Failure:
    return Failure(rank, f"node{rank}", kind, f"{kind} of {rank}", lost, time)


def write(run_dir: Path, by: int, what: Failure) -> None:
    report(run_dir, "5.0.0", what, rank=by, host=f"node{by}")


def test_an_error_stands_before_what_followed_from_it(tmp_path: Path) -> None:
    kinds = ["signal", "peer", "stall", "lost", "error"]
    for rank, kind in enumerate(kinds):
        write(tmp_path, rank, failure(rank, kind, time=float(rank)))  # the error came last
    assert [each.kind for each in causes(tmp_path, "5.0.0")] == ["error", "lost", "stall", "peer", "signal"]
    assert causes(tmp_path, "5.0.1") == []  # of another start of the job


def test_of_two_errors_the_earlier_is_the_cause(tmp_path: Path) -> None:
    write(tmp_path, 0, failure(0, "error", time=9.0))
    write(tmp_path, 1, failure(1, "error", time=8.0))
    assert [each.rank for each in causes(tmp_path, "5.0.0")] == [1, 0]


def test_a_rank_that_many_report_is_told_once(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        write(tmp_path, rank, failure(2, "lost", time=4.0 - rank, lost=("node2",)))
    assert causes(tmp_path, "5.0.0") == [failure(2, "lost", time=1.0, lost=("node2",))]


def test_a_host_from_which_a_rank_reports_the_same_is_not_lost(tmp_path: Path) -> None:
    for rank in (1, 2):
        write(tmp_path, rank, failure(0, "lost", lost=("node0", "node2")))
    assert causes(tmp_path, "5.0.0")[0].lost_hosts == ("node0",)


def test_in_a_parted_network_the_larger_part_is_believed_and_else_rank_0s(tmp_path: Path) -> None:
    write(tmp_path, 0, failure(1, "lost", time=2.0, lost=("node1",)))
    write(tmp_path, 1, failure(0, "lost", time=1.0, lost=("node0",)))
    assert causes(tmp_path, "5.0.0")[0].rank == 1
    write(tmp_path, 2, failure(0, "lost", time=3.0, lost=("node0",)))
    assert causes(tmp_path, "5.0.0")[0].rank == 0


def test_the_first_report_of_a_rank_stays(tmp_path: Path) -> None:
    write(tmp_path, 1, failure(1, "error"))
    write(tmp_path, 1, failure(0, "lost"))
    assert causes(tmp_path, "5.0.0") == [failure(1, "error")]


def test_a_disk_that_takes_nothing_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("a file where the folder should be")
    write(tmp_path, 1, failure(1, "error"))
    assert causes(tmp_path, "5.0.0") == []


def test_a_damaged_report_hides_no_other(tmp_path: Path) -> None:
    write(tmp_path, 1, failure(1, "error"))
    (folder(tmp_path, "5.0.0") / "rank-0.json").write_text('{"rank": 0, "ho')
    (folder(tmp_path, "5.0.0") / "rank-2.json").write_text(json.dumps({"by": {"rank": 2, "host": ""}, "rank": 2}))
    assert [each.rank for each in causes(tmp_path, "5.0.0")] == [1]


def test_the_cause_is_told_in_one_line_before_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.txt").write_text("".join(f"line {n}\n" for n in range(30)))
    shown = lines(tmp_path, failure(3, "error"))
    assert shown[0] == "rpp: rank 3 on node3: error of 3"
    assert shown[2:] == [f"line {n}" for n in range(10, 30)]


def test_what_a_rank_says_of_its_own_exception() -> None:
    def told(error: BaseException) -> tuple[str, str, int]:
        each = failure_of(error, 1, "node0")
        return each.kind, each.message, each.exit_code

    assert told(ValueError("data.x must\n  exist")) == ("error", "data.x must exist", 2)
    assert told(TakenOver("another job has")) == ("error", "another job has", 76)
    assert told(KeyError("x")) == ("error", "KeyError: 'x'", 1)
    assert told(KeyboardInterrupt()) == ("signal", "was interrupted", 130)
    assert told(SystemExit(143)) == ("signal", "was ended by SIGTERM", 143)


def test_an_accident_in_the_middle_of_a_run_is_not_taken_for_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_failure, "_has_begun", False)
    of_a_library = json.JSONDecodeError("Expecting value", "", 0)
    before = [failure_of(error, 0, "a").exit_code for error in (ValueError("x"), of_a_library, ConfigError("x"))]
    own_failure.training_begins()
    after = [failure_of(error, 0, "a").exit_code for error in (ValueError("x"), of_a_library, ConfigError("x"))]
    assert (before, after) == ([2, 1, 2], [1, 1, 2])
    assert failure_of(ValueError("x"), 0, "a").message == "ValueError: x"  # its kind is needed, without the traceback


def test_errors_of_collectives_only_say_that_a_peer_is_gone() -> None:
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9")
    inside = RuntimeError("the step failed")
    inside.__cause__ = dist.DistNetworkError("Broken pipe")
    for error in (closed, dist.DistBackendError("NCCL error"), RanksMissing("sync", [2], 5.0), inside):
        assert failure_of(error, 1, "node0").kind == "peer"
    for error in (RuntimeError("CUDA out of memory"), OSError("no space left on device")):
        assert failure_of(error, 1, "node0").kind == "error"


def beats(count: int, silent: tuple[int, ...] = (), at: int = 0) -> dict[int, Beat]:
    """Of four ranks on two nodes; those that are `silent` have not gone beyond beat `at`."""
    return {rank: Beat(at if rank in silent else count, RUNS, f"node{rank // 2}") for rank in range(4)}


def test_all_ranks_of_a_dead_host_are_lost_at_once_though_one_beat_later() -> None:
    judge = Judge(deadline_s=10.0, interval_s=1.0)
    for count in range(14):
        found = beats(count)
        found[2] = Beat(min(count, 2), RUNS, "node1")
        found[3] = Beat(min(count, 3), RUNS, "node1")
        lost, _ = judge.lost(found, 1.0, is_alarmed=False)
        assert lost == ([2, 3] if count == 13 else [])
    assert lost_hosts(lost, found) == ("node1",)
    assert lost_hosts([2], found) == ()


def test_after_an_alarm_a_rank_is_lost_sooner() -> None:
    judge = Judge(deadline_s=30.0, interval_s=1.0)
    looks = [judge.lost(beats(count, silent=(1,)), 1.0, is_alarmed=True)[0] for count in range(6)]
    assert looks == [[], [], [], [], [], [1]]


def test_a_judge_that_was_held_up_accuses_nobody() -> None:
    judge = Judge(deadline_s=10.0, interval_s=1.0)
    judge.lost(beats(0), 1.0, is_alarmed=False)
    assert judge.lost(beats(0), 600.0, is_alarmed=False) == ([], 0.0)  # all were suspended with it, as a laptop is
    assert judge.lost({**beats(0), 3: Beat(0, DONE, "node1")}, 600.0, is_alarmed=False) == ([], 0.0)
