"""The launcher, with ranks that are a few lines of Python and no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp.parallel.local_launch import launch_local

PRELUDE = "import os, sys, time, signal; rank = int(os.environ['RANK'])\n"


def rank_program(body: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + body]


def launcher(body: str, world_size: int, run_dir: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from megatron_rpp.parallel.local_launch import launch_local; "
        f"sys.exit(launch_local({rank_program(body)!r}, {world_size}, {str(run_dir)!r}))"
    )
    argv = [sys.executable, "-c", code]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(done: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def pids(run_dir: Path, count: int) -> list[int]:
    """The process ids that `count` ranks have written to their own files."""
    paths = [run_dir / f"pid-{rank}" for rank in range(count)]
    wait_for(lambda: all(path.exists() and path.read_text().endswith("\n") for path in paths))
    return [int(path.read_text()) for path in paths]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_pid(run_dir: Path) -> str:
    return f"open(f'{run_dir}/pid-{{rank}}', 'w').write(f'{{os.getpid()}}\\n')\n"


def test_ranks_get_torchruns_variables_and_rank_0_the_listening_socket(tmp_path: Path) -> None:
    body = f"""
import socket
names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'.split()
open(f'{tmp_path}/env-{{rank}}', 'w').write(' '.join(os.environ[name] for name in names))
port = int(os.environ['MASTER_PORT'])
if rank == 0:
    listener = socket.socket(fileno=int(os.environ['RPP_MASTER_LISTEN_FD']))
    assert listener.getsockname() == ('127.0.0.1', port)
    listener.accept()[0].sendall(b'met')
else:
    assert 'RPP_MASTER_LISTEN_FD' not in os.environ
    assert socket.create_connection(('127.0.0.1', port), timeout=10).recv(3) == b'met'
"""
    assert launch_local(rank_program(body), 2, tmp_path) == 0
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert (tmp_path / "env-0").read_text() == f"0 0 2 2 127.0.0.1 {threads}"
    assert (tmp_path / "env-1").read_text() == f"1 1 2 2 127.0.0.1 {threads}"


def test_only_rank_0_writes_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(rank_program("print('rank', rank); print('err', rank, file=sys.stderr)"), 2, tmp_path) == 0
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("rank 0\n", "err 0\n")
    assert sorted((tmp_path / "logs" / "rank-1.txt").read_text().splitlines()) == ["err 1", "rank 1"]


def test_a_failing_rank_ends_the_others_and_shows_the_end_of_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = write_pid(tmp_path) + (
        "if rank == 1:\n"
        f"    while not os.path.exists('{tmp_path}/pid-0'): time.sleep(0.01)\n"
        "    print('\\n'.join(f'line {n}' for n in range(30)), file=sys.stderr); sys.exit(7)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert launch_local(rank_program(body), 2, tmp_path) == 7
    assert time.monotonic() - start < 8
    assert not any(alive(pid) for pid in pids(tmp_path, 2))
    shown = capfd.readouterr().err.splitlines()
    assert shown[0] == "rpp: rank 1 ended with exit code 7"
    assert shown[2:] == [f"line {n}" for n in range(10, 30)]


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rpp.parallel.local_launch.GRACE_S", 0.3)
    body = (
        "if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + write_pid(tmp_path)
        + f"while rank == 1 and not os.path.exists('{tmp_path}/pid-0'): time.sleep(0.01)\n"
        + "sys.exit(3) if rank == 1 else time.sleep(60)"
    )
    assert launch_local(rank_program(body), 2, tmp_path) == 3
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


def test_a_users_mistake_wins_over_a_crash_that_it_caused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "if rank == 1: sys.exit('connection lost')\n"
    body += "time.sleep(0.3); sys.exit(print('rpp: error: said once', file=sys.stderr) or 2)"
    assert launch_local(rank_program(body), 2, tmp_path) == 2
    assert capfd.readouterr().err == "rpp: error: said once\n"


def test_a_mistake_that_only_another_rank_sees_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rpp.parallel.local_launch.TELL_S", 0.5)
    body = "if rank == 1: sys.exit(print('rpp: error: seen by rank 1', file=sys.stderr) or 2)\ntime.sleep(60)"
    assert launch_local(rank_program(body), 2, tmp_path) == 2
    assert capfd.readouterr().err == "rpp: error: seen by rank 1\n"


def test_a_rank_that_is_killed_gives_the_shells_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(rank_program("os.kill(os.getpid(), signal.SIGKILL)"), 1, tmp_path) == 137
    assert capfd.readouterr().err == "rpp: rank 0 was ended by SIGKILL\n"


def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    process = launcher(write_pid(tmp_path) + "time.sleep(60)", 2, tmp_path)
    ranks = pids(tmp_path, 2)
    assert all(alive(pid) for pid in ranks)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in ranks))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank_and_the_launcher_waits_for_them(tmp_path: Path, number: signal.Signals) -> None:
    body = (
        "def note(n, frame):\n"
        f"    open(f'{tmp_path}/got-{{rank}}', 'w').write(str(n)); time.sleep(0.2); sys.exit(0)\n"
        f"signal.signal({int(number)}, note)\n" + write_pid(tmp_path) + "time.sleep(60)"
    )
    process = launcher(body, 2, tmp_path)
    pids(tmp_path, 2)
    process.send_signal(number)
    assert process.wait(timeout=10) == 0
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    process.communicate()


def test_ranks_that_saved_and_stopped_are_not_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"time.sleep(1.5 * rank); open(f'{tmp_path}/end-{{rank}}', 'w'); sys.exit(75)"
    assert launch_local(rank_program(body), 2, tmp_path) == 75
    assert (tmp_path / "end-1").exists()  # the slower one was not ended
    assert capfd.readouterr().err == ""


def test_a_job_that_was_replaced_says_so_though_a_rank_ended_first_for_want_of_it(tmp_path: Path) -> None:
    assert launch_local(rank_program("sys.exit(76 if rank else 1)"), 2, tmp_path) == 76


def test_a_failure_is_not_hidden_by_ranks_that_saved(tmp_path: Path) -> None:
    assert launch_local(rank_program("sys.exit(3 if rank else 75)"), 2, tmp_path) == 3


def test_a_request_to_save_reaches_every_rank_even_while_it_starts(tmp_path: Path) -> None:
    body = write_pid(tmp_path) + (
        "time.sleep(1)\n"  # imports
        "from megatron_rpp.parallel import stop_request\n"
        "stop_request.listen({})\n"
        "while not stop_request.is_requested(): time.sleep(0.01)\n"
        "sys.exit(75)"
    )
    process = launcher(body, 2, tmp_path)
    pids(tmp_path, 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75
    process.communicate()


REPORT = """
from megatron_rpp.parallel.failures import Failure, report
def tell(kind, about):
    failure = Failure(about, 'node7', kind, f'{kind} of {about}', (), time.time())
    report(run_dir, os.environ['RPP_LOCAL_JOB'], failure, rank=rank, host='node7')
"""


def test_the_cause_that_ranks_reported_is_shown_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"run_dir = {str(tmp_path)!r}\n" + REPORT
    body += "print(f'the log of {rank}', file=sys.stderr) if rank else None\n"
    body += "tell('error' if rank == 2 else 'peer', rank); time.sleep(0.3 * rank); sys.exit(1)"
    assert launch_local(rank_program(body), 3, tmp_path) == 1  # rank 0 was seen to fail first
    shown = capfd.readouterr().err.splitlines()
    assert shown[0] == "rpp: rank 2 on node7: error of 2"
    assert shown[2:] == ["the log of 2"]


def test_a_killed_rank_is_named_though_the_others_only_miss_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = f"run_dir = {str(tmp_path)!r}\n" + REPORT
    body += "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(0.5); tell('lost', 0); sys.exit(1)"
    assert launch_local(rank_program(body), 2, tmp_path) == 137
    assert capfd.readouterr().err == "rpp: rank 0 was ended by SIGKILL\n"


EXIT_ON_SIGTERM = """
from megatron_rpp.parallel.rank_process import exit_on_sigterm
exit_on_sigterm(grace_s=0.3)
"""


def test_sigterm_runs_finally_blocks(tmp_path: Path) -> None:
    body = EXIT_ON_SIGTERM + (
        f"try:\n    print('ready', flush=True); time.sleep(60)\nfinally:\n    open('{tmp_path}/cleaned', 'w')\n"
    )
    env = {**os.environ, "RANK": "0"}
    with subprocess.Popen(rank_program(body), stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=10) == 143
    assert (tmp_path / "cleaned").exists()


def test_a_rank_that_is_stuck_in_c_code_still_ends() -> None:
    # Locking a mutex twice waits for ever, and goes on waiting after a signal, as a dead collective does.
    body = EXIT_ON_SIGTERM + (
        "import ctypes\n"
        "mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
        "libc.pthread_mutex_lock(mutex); print('ready', flush=True); libc.pthread_mutex_lock(mutex)\n"
    )
    env = {**os.environ, "RANK": "0"}
    with subprocess.Popen(rank_program(body), stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=10) == 143


def test_a_forked_worker_that_is_terminated_does_not_end_its_rank() -> None:
    body = EXIT_ON_SIGTERM + (
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(60)\n"
        "time.sleep(0.1); os.kill(pid, signal.SIGTERM)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM\n"
        "time.sleep(0.6); sys.exit(5)"
    )
    assert subprocess.run(rank_program(body), env={**os.environ, "RANK": "0"}, timeout=20).returncode == 5


def test_what_the_launching_process_has_set_for_itself_does_not_reach_the_ranks_as_the_users(tmp_path: Path) -> None:
    """`rpp train` has imported device/, to look at the model, before it starts the ranks."""
    names = ("TORCHINDUCTOR_COMPILE_THREADS", "OF_THE_USER")
    body = f"open({str(tmp_path / 'found')!r}, 'w').write(repr([os.environ.get(name) for name in {names!r}]))"
    code = (
        "import os, sys, megatron_rpp.device; from megatron_rpp.parallel.local_launch import launch_local; "
        f"assert os.environ[{names[0]!r}]; sys.exit(launch_local({rank_program(body)!r}, 1, {str(tmp_path)!r}))"
    )
    env = {name: value for name, value in os.environ.items() if name not in names} | {"OF_THE_USER": "4"}
    for given, found in ((env, [None, "4"]), (env | {names[0]: "7"}, ["7", "4"])):
        subprocess.run([sys.executable, "-c", code], env=env | given, check=True, timeout=120)
        assert (tmp_path / "found").read_text() == repr(found)
