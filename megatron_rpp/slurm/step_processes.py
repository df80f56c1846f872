"""The sruns of a job: started, started again, ended."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence

from megatron_rpp.parallel.exit_codes import USER_ERROR

logger = logging.getLogger("megatron_rpp.slurm")

Step = subprocess.Popen[bytes]

_AGAIN_S = 10.0  # between two starts of one step
_GRACE_S = 15.0  # for a step that was told to end


def start(argv: Sequence[str], attempt: str) -> Step:
    """One srun; its tasks know the job's start by RPP_ATTEMPT."""
    logger.info("%s", " ".join(argv))
    return subprocess.Popen(argv, env={**os.environ, "RPP_ATTEMPT": attempt}, stdin=subprocess.DEVNULL)


class Lasting:
    """A step that is started again where it has ended as a whole while the trainer goes on."""

    def __init__(self, name: str, start: Callable[[], Step]) -> None:
        self._name, self._start = name, start
        self.process, self._started_at = start(), time.monotonic()

    @property
    def has_users_mistake(self) -> bool:
        """It has told the user what to change, and would say the same again."""
        return self.process.poll() == USER_ERROR

    def look(self) -> None:
        if self.process.poll() is not None and time.monotonic() - self._started_at > _AGAIN_S:
            logger.warning("the step %s has ended (%s); starting it again", self._name, self.process.returncode)
            self.process, self._started_at = self._start(), time.monotonic()


def end(steps: Sequence[Step]) -> None:
    """SIGTERM, which srun passes on; what is left of them ends with the job."""
    for step in steps:
        step.terminate()  # nothing where it has ended
    deadline = time.monotonic() + _GRACE_S
    for step in steps:
        try:
            step.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            step.kill()
