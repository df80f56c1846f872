"""An exception of a rank, as what the others and the reports are told of it."""

from __future__ import annotations

import signal
import sys
import time
from typing import TypeGuard

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.exit_codes import INTERRUPTED, TAKEN_OVER, USER_ERROR, TakenOver
from megatron_rpp.parallel.failures import Failure

_LONGEST = 500
_has_begun = False


def training_begins() -> None:
    """All that the user has given has been read: from here on only a ConfigError is the user's mistake."""
    global _has_begun
    _has_begun = True


def is_users_mistake(error: BaseException) -> TypeGuard[ValueError]:
    """Whether `error` tells the user what to change, so that starting again would end the same.

    Libraries raise ValueErrors, too: for what the user gave while that is read, and for any accident later on. Their
    own kinds of it (JSONDecodeError) tell a user nothing.
    """
    return isinstance(error, ConfigError) or (type(error) is ValueError and not _has_begun)


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
    if isinstance(error, TakenOver):
        return "error", words, TAKEN_OVER
    if _is_echo(error):
        return "peer", f"{type(error).__name__}: {words}", 1
    if is_users_mistake(error):
        return "error", words, USER_ERROR
    return "error", f"{type(error).__name__}: {words}", 1


def _is_echo(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # a user's mistake that was found early should not cost its import
        return False
    from megatron_rpp.parallel.peer_errors import is_echo

    return is_echo(error)
