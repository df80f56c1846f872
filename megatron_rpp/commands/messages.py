"""How a command tells its user what to change."""

from __future__ import annotations

import sys

from megatron_rpp.parallel.environment import speaks_for_job
from megatron_rpp.parallel.exit_codes import ERROR_PREFIX, USER_ERROR


def user_error(error: ValueError) -> int:
    """Tell the user, once a job."""
    if speaks_for_job():
        sys.stderr.write(error_line(error))
    return USER_ERROR


def error_line(error: ValueError) -> str:
    return f"{ERROR_PREFIX}{' '.join(str(error).split())}\n"
