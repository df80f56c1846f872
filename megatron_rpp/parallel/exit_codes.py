"""What the exit codes of a job and of its ranks mean, beside 0 and 1. Imports no torch."""

from __future__ import annotations

import signal

USER_ERROR = 2
"""The user has been told what to change; starting again would end the same."""
STOPPED = 75
"""Saved at a safe point because it was asked to stop; wants to be started again (EX_TEMPFAIL of sysexits.h)."""
TAKEN_OVER = 76
"""Another start of the job has claimed run.dir; this one must not be started again."""
INTERRUPTED = 130
"""By Ctrl-C."""
ENDED_BY_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Of ranks that somebody outside of the job has ended."""

ERROR_PREFIX = "rpp: error: "
"""How the one line begins that a user's mistake ends with."""


class TakenOver(OSError):
    """Another job has claimed the run directory; this one must not write there any more, and ends with TAKEN_OVER."""
