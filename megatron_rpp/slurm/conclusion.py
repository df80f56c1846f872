"""What follows from the way a start of a job has ended: nothing more, another start, or another job."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.exit_codes import STOPPED, USER_ERROR
from megatron_rpp.slurm import client
from megatron_rpp.slurm.allocation import Allocation
from megatron_rpp.slurm.guard import retried
from megatron_rpp.slurm.history import Try
from megatron_rpp.slurm.replacement import Replacement

logger = logging.getLogger("megatron_rpp.slurm")


@dataclass(frozen=True)
class Ending:
    """How the trainer ended."""

    kind: str  # one of Try's
    cause: str = ""
    bad_nodes: tuple[str, ...] = ()
    host: str = ""  # of the rank that the cause happened to
    is_users_mistake: bool = False
    is_final: bool = False  # another job goes on with the run


def conclude(ending: Ending, allocation: Allocation, replacement: Replacement, config: Config) -> int:
    """Act on it, after it was written into the history; the exit code of the batch script. Raises SlurmError."""
    if ending.kind == Try.DONE:
        logger.info("the run is complete: %s", config.run.dir)
        return 0
    logger.error("%s", ending.cause)
    if ending.is_users_mistake:
        return USER_ERROR
    if ending.is_final:
        return 1
    in_vain, limit = replacement.history.in_vain(), config.slurm.max_tries
    if in_vain >= limit:
        logger.error("given up: %d tries in a row have finished no step (slurm.max_tries=%d)", in_vain, limit)
        return 1
    retried(lambda: _start_again(ending, allocation, replacement))
    return STOPPED


def _start_again(ending: Ending, allocation: Allocation, replacement: Replacement) -> None:
    """Raises SlurmError where SLURM does not answer, or refuses."""
    job, excluded = allocation.job, replacement.history.excluded()
    if client.job_state(job) != "RUNNING":
        logger.warning("job %s was cancelled, or is SLURM's to requeue", job)
        return
    without = f", without {', '.join(excluded)}" if excluded else ""
    if ending.kind == Try.LOST_NODES:
        try:
            if new := replacement.submit_once():
                logger.warning("job %s replaces this one%s", new, without)
            return
        except client.SlurmError as error:
            logger.warning("%s; requeueing, which waits until SLURM has given the lost nodes up", error)
    logger.warning("requeueing job %s%s", job, without)
    client.requeue(job)  # SLURM ends this very process soon
    if excluded:
        users = replacement.load().excluded
        client.exclude(job, [*users, *excluded])
