"""Forks the ranks of tests' jobs from one process that has torch and Megatron imported: a start costs no seconds.

`run_ranks("tests.distributed.plan_worker", arguments, 4, out)` calls its `main` as each of four ranks. Where the
launcher itself matters, a test starts its job by launch_local or `rpp`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_ranks(module: str, arguments: Sequence[str], world_size: int, out: Path) -> None:
    """`python -m MODULE ARGUMENTS` as every rank, each with a log in OUT/logs; AssertionError where one fails."""
    codes = json.loads(_ask([module, list(arguments), world_size, str(out / "logs")]))
    tails = [(out / "logs" / f"rank-{rank}.txt").read_text()[-2000:] for rank, code in enumerate(codes) if code == 1]
    assert codes == [0] * world_size, "\n".join([f"{module}: the ranks ended with {codes}; see {out}/logs", *tails])


def _ask(job: list[object]) -> str:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    try:
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of ranks has ended with {server.wait()}"
        return answer
    except BaseException:  # a test's time is up: its answer must not be the next one's
        server.kill()
        _server.cache_clear()
        raise


@cache
def _server() -> subprocess.Popen[str]:
    """It ends with its stdin, that is with this process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", __name__]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=REPOSITORY, start_new_session=True
    )


def main() -> None:
    import megatron_rpp.device  # noqa: F401 - before any module that imports megatron
    from tests.support.forked_ranks import run_forked

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        module, arguments, world_size, logs = json.loads(line)
        action = partial(_rank, importlib.import_module(module), arguments)
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"a fork of a process with {len(threads)} threads may hang; {module} has started some"
        gc.freeze()  # ranks share these pages until they are written to
        replies.write(json.dumps(run_forked(world_size, action, Path(logs))) + "\n")


def _rank(module: object, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    try:
        module.main()  # type: ignore[attr-defined]
    except SystemExit as end:
        assert not end.code, f"exit code {end.code}"


if __name__ == "__main__":
    main()
