"""What the exit codes of a job and of its ranks mean, beside 0 and 1. Imports no torch."""

from __future__ import annotations

USER_ERROR = 2
"""The user has been told what to change; starting again would end the same."""
STOPPED = 75
"""Saved at a safe point because it was asked to stop; wants to be started again (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""By Ctrl-C."""
