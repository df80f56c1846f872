"""When SLURM will end this job."""

from __future__ import annotations

import math
import time
from datetime import datetime

from megatron_rpp.slurm import client


def seconds_left(job: str) -> float:
    """Until the job's time limit; infinite where there is none, or SLURM does not say."""
    try:
        text = client.jobs(job)[0].get("EndTime", "")
        return datetime.fromisoformat(text).timestamp() - time.time()
    except (client.SlurmError, ValueError):
        return math.inf
