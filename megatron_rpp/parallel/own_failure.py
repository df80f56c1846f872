"""An exception of a rank, as what the others and the reports are told of it."""

from __future__ import annotations

import signal
import sys
import time

from megatron_rpp.parallel.exit_codes import INTERRUPTED, USER_ERROR
from megatron_rpp.parallel.failures import Failure

_LONGEST = 500


def failure_of(error: BaseException, rank: int, host: str) -> Failure:
    """The failure of `rank` on `host` that ended with `error`."""
    kind, message, code = _describe(error)
    return Failure(rank, host, kind, message[:_LONGEST], (), time.time(), code)


def _describe(error: BaseException) -> tuple[str, str, int]:
    """(kind, message, exit code)."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "signal", "was interrupted", INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int) and 128 < error.code < 192:
        return "signal", f"was ended by {signal.Signals(error.code - 128).name}", error.code
    if _is_echo(error):
        return "peer", f"{type(error).__name__}: {words}", 1
    if isinstance(error, ValueError):
        return "error", words, USER_ERROR
    return "error", f"{type(error).__name__}: {words}", 1


def _is_echo(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # a user's mistake that was found early should not cost its import
        return False
    from megatron_rpp.parallel.peer_errors import is_echo

    return is_echo(error)
