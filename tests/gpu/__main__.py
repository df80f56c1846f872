"""Runs all GPU tests: `python -m tests.gpu [--out FILE] [--limit SECONDS] [pytest's own arguments, such as -k NAME]`.

Prints what packages are missing, then a line a test as it ends, the most telling tests first; FILE gets the same as
JSON lines, so that a run which is cut off loses nothing. A test that ends its process, loses the GPU or takes longer
than --limit is a line, too, and another process goes on behind it, as behind one that ends between two tests. The
exit code is 0 where all have passed or were skipped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu import preflight, table

HERE = Path(__file__).parent
Event = dict[str, Any]
POLL_S = 0.2
COLLECTION_S = 60.0
"""The least limit of what is no test: importing torch and all of them, and what stands between them."""
TOO_LONG = 124
"""Exit code, as it were, of a process that was killed for a test of its own, or for none."""


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the results, written as they come")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one test may take")
    options, rest = parser.parse_known_args(arguments)
    sys.stdout.write(preflight.line() + "\n")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="tests-gpu-") as scratch:
        journal = options.out or Path(scratch) / "journal"
        journal.unlink(missing_ok=True)
        while True:
            before = _ends(journal)
            code, name = _session(journal, folder, options.limit, rest)
            if _finished(journal, code):
                return _conclusion(journal)
            how = f"signal {-code}" if code < 0 else "too long" if code == TOO_LONG else f"exit code {code}"
            if name is not None:
                table.say(journal, name, "crashed", reason=f"over {options.limit:g} s" if code == TOO_LONG else how)
            elif _ends(journal) == before:  # another process would end there, too
                sys.stdout.write(f"pytest itself has ended before any test: {how}\n")
                return _conclusion(journal) or 1


def _session(journal: Path, folder: Path, limit_s: float, arguments: Sequence[str]) -> tuple[int, str | None]:
    """One process of tests, which is killed where one of them, or collecting them, takes too long.

    Returns: its exit code, and the test that has ended it; None where none has.
    """
    dump = ["-o", f"faulthandler_timeout={max(limit_s - 10, 1):g}"]  # says first where it hangs
    command = [sys.executable, "-m", "tests.gpu.session", str(journal), str(folder), *dump, *arguments]
    process = subprocess.Popen(command, start_new_session=True)
    seen, since = _last(journal), time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            if (now := _last(journal)) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > (limit_s if _running(seen) else max(limit_s, COLLECTION_S)):
                _end(process)
                return TOO_LONG, _to_blame(journal, seen)
        return process.returncode, _running(_last(journal))
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last(journal: Path) -> Event | None:
    """The last test that has begun or ended."""
    return next((event for event in table.read(journal)[::-1] if event["event"] in ("start", "end")), None)


def _running(last: Event | None) -> str | None:
    """The test that has begun and not ended."""
    return last["name"] if last is not None and last["event"] == "start" else None


def _to_blame(journal: Path, seen: Event | None) -> str | None:
    """The test that `seen` began, unless it has ended while its process was being killed."""
    return _running(seen) if _last(journal) == seen else None


def _ends(journal: Path) -> int:
    return sum(event["event"] == "end" for event in table.read(journal))


def _finished(journal: Path, code: int) -> bool:
    return code >= 0 and any(event["event"] == "finished" for event in table.read(journal))


def _conclusion(journal: Path) -> int:
    """Prints how many ended how, and what did not end well, again; the exit code."""
    events = table.read(journal)
    ends = [event for event in events if event["event"] == "end"]
    bad = [event for event in ends if event["outcome"] not in ("passed", "skipped")]
    counts = Counter(event["outcome"] for event in ends)
    lines = [*map(table.line, bad), ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test"]
    sys.stdout.write("\n".join(["", *lines, ""]))
    codes = [event["code"] for event in events if event["event"] == "finished"]
    no_tests = codes == [5] and not ends  # of pytest: a -k that fits none
    return 1 if bad or no_tests or any(code not in (0, 1, 5) for code in codes) else 0


if __name__ == "__main__":
    sys.exit(main())
