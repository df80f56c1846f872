"""`rpp slurm-job`: runs the steps of a job, and decides what follows from how they end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.exit_codes import STOPPED, USER_ERROR
from megatron_rpp.parallel.failures import Failure, causes
from megatron_rpp.slurm import client
from megatron_rpp.slurm.allocation import Allocation
from megatron_rpp.slurm.guard import NodeWatch
from megatron_rpp.slurm.history import History, Try, steps_done
from megatron_rpp.slurm.preflight import examine
from megatron_rpp.slurm.replacement import Replacement
from megatron_rpp.slurm.steps import REGISTRY, Steps

logger = logging.getLogger("megatron_rpp.slurm")

_POLL_S = 0.2
_SERVE_AGAIN_S = 10.0  # between two starts of the servers' step
_GRACE_S = 15.0  # for a step that was told to end


@dataclass(frozen=True)
class Ending:
    """How the trainer ended."""

    kind: str  # one of Try's
    cause: str = ""
    bad_nodes: tuple[str, ...] = ()
    is_users_mistake: bool = False


class Supervisor:
    """One start of a job, from its batch script. `run` returns the script's exit code."""

    def __init__(self, config: Config, allocation: Allocation, words: Sequence[str]) -> None:
        self._config, self._allocation, self._words = config, allocation, tuple(words)
        self._run_dir = Path(config.run.dir)
        self._steps = Steps(config, allocation, self._words)
        self._history = History(self._run_dir)
        self._replacement = Replacement(self._run_dir, allocation.attempt)
        self._signals: list[int] = []
        self._lost_servers: set[str] = set()

    def run(self) -> int:
        """Until the trainer ends, and the job is done, given up, or in the queue again."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        (self._run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._history.begin(self._allocation.attempt, self._allocation.nodes, steps_done(self._run_dir))
        self._replacement.save(self._allocation.nodes, self._words)
        ending = self._preflight() or self._run_steps()
        self._history.end(
            self._allocation.attempt, ending.kind, ending.cause, steps_done(self._run_dir), ending.bad_nodes
        )
        return self._conclude(ending)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _preflight(self) -> Ending | None:
        """Where the doctor finds that the job cannot run, and whether it could without some of its nodes."""
        if not self._config.slurm.doctor or self._config.slurm.container:  # SLURM's commands are outside of it
            return None
        checkup = examine((*self._words, REGISTRY), self._run_dir)
        if checkup.has_passed:
            return None
        return Ending(Try.FAILED, checkup.cause, checkup.bad_nodes, is_users_mistake=not checkup.bad_nodes)

    def _run_steps(self) -> Ending:
        watch = NodeWatch(self._allocation.nodes, self._config.watchdog.heartbeat_deadline_s)
        started: list[subprocess.Popen[bytes]] = []
        try:
            started.append(self._start(self._steps.guard(self._allocation.batch_host, watch.port)))
            serve = _Again(lambda: self._start(self._steps.serve()))
            started.append(serve.process)
            train = self._start(self._steps.train())
            started.append(train)
            return self._watch(train, serve, watch)
        finally:
            watch.close()
            _end([*started, serve.process])

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        logger.info("%s", " ".join(argv))
        env = {**os.environ, "RPP_ATTEMPT": self._allocation.attempt}
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL)

    def _watch(self, train: subprocess.Popen[bytes], serve: _Again, watch: NodeWatch) -> Ending:
        """Until the trainer has ended, or cannot end by itself."""
        was_told = False
        while (code := train.poll()) is None:
            if self._signals and not was_told:
                logger.warning("%s: saving at the next safe point", signal.Signals(self._signals[0]).name)
                train.send_signal(signal.SIGUSR1)  # srun passes it on to the ranks
                was_told = True
            serve.look()
            if lost := self._lost_trainer_nodes(watch):
                return Ending(Try.LOST_NODES, f"node {', '.join(lost)} is lost", lost)
            if stuck := self._stuck():
                return Ending(Try.FAILED, str(stuck), stuck.lost_hosts)
            time.sleep(_POLL_S)
        return self._ending(code, watch)

    def _ending(self, code: int, watch: NodeWatch) -> Ending:
        if code == 0 and steps_done(self._run_dir) >= self._config.run.steps:  # srun can return 0 for a lost node
            return Ending(Try.DONE)
        if code == STOPPED:
            return Ending(Try.STOPPED, "stopped at a safe point")
        found = causes(self._run_dir, self._allocation.attempt)
        cause = str(found[0]) if found else f"the trainer's step ended with exit code {code}"
        # A peer that has lost a whole node ends first; its guard falls silent a little later.
        lost = self._wait_for_lost(watch) if any(each.kind in ("lost", "peer") for each in found) else ()
        if lost:
            return Ending(Try.LOST_NODES, f"node {', '.join(lost)} is lost; {cause}", lost)
        return Ending(Try.FAILED, cause, self._twice_bad(found), is_users_mistake=code == USER_ERROR)

    def _wait_for_lost(self, watch: NodeWatch) -> tuple[str, ...]:
        end = time.monotonic() + self._config.watchdog.heartbeat_deadline_s
        while not (lost := self._lost_trainer_nodes(watch)) and time.monotonic() < end:
            time.sleep(_POLL_S)
        return lost

    def _lost_trainer_nodes(self, watch: NodeWatch) -> tuple[str, ...]:
        lost = watch.lost()
        for node in set(lost) - set(self._allocation.trainer_nodes) - self._lost_servers:
            logger.warning("node %s is lost, and the servers on it; the others go on", node)
            self._lost_servers.add(node)
        return tuple(node for node in lost if node in self._allocation.trainer_nodes)

    def _stuck(self) -> Failure | None:
        """The cause, where ranks have reported one long ago and the step still has not ended."""
        found = causes(self._run_dir, self._allocation.attempt)
        limit = 2 * self._config.watchdog.heartbeat_deadline_s + _GRACE_S
        return found[0] if found and time.time() - max(each.time for each in found) > limit else None

    def _twice_bad(self, found: Sequence[Failure]) -> tuple[str, ...]:
        """The host of the cause, if the try before failed on it too: it answers, but something is wrong with it."""
        before = [each for each in self._history.tries() if each.attempt != self._allocation.attempt][-1:]
        if found and before and before[0].is_in_vain and f"on {found[0].host}:" in before[0].cause:
            return (found[0].host,)
        return ()

    def _conclude(self, ending: Ending) -> int:
        if ending.kind == Try.DONE:
            logger.info("the run is complete: %s", self._run_dir)
            return 0
        logger.error("%s", ending.cause)
        if ending.is_users_mistake:
            return USER_ERROR
        in_vain, limit = self._history.in_vain(), self._config.slurm.max_tries
        if in_vain >= limit:
            logger.error("given up: %d tries in a row have finished no step (slurm.max_tries=%d)", in_vain, limit)
            return 1
        job_id = self._allocation.job_id
        if client.job_fields(job_id).get("JobState") != "RUNNING":
            logger.warning("job %s was cancelled, or is SLURM's to requeue", job_id)
        elif ending.kind == Try.LOST_NODES:
            self._replace(ending)
        else:
            self._requeue()
        return STOPPED

    def _replace(self, ending: Ending) -> None:
        if self._replacement.claim():
            new = self._replacement.submit(ending.bad_nodes, ending.cause)
            logger.warning("job %s replaces this one, without %s", new, ", ".join(self._history.excluded()))

    def _requeue(self) -> None:
        """SLURM ends this very process meanwhile."""
        job_id, excluded = self._allocation.job_id, self._history.excluded()
        logger.warning("requeueing job %s%s", job_id, f", without {', '.join(excluded)}" if excluded else "")
        client.requeue(job_id)
        if excluded:
            client.exclude(job_id, excluded)


class _Again:
    """A step that is started again when it has failed as a whole."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self.process, self._started_at = start(), time.monotonic()

    def look(self) -> None:
        if self.process.poll() not in (None, 0) and time.monotonic() - self._started_at > _SERVE_AGAIN_S:
            logger.warning("the servers' step has ended; starting it again")
            self.process, self._started_at = self._start(), time.monotonic()


def _end(steps: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, which srun passes on; what is left of them ends with the job."""
    for step in steps:
        step.terminate()  # nothing where it has ended
    end = time.monotonic() + _GRACE_S
    for step in steps:
        try:
            step.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            step.kill()
