"""`rpp slurm-job`: runs the steps of a job until its trainer ends. conclusion.py decides what follows."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.exit_codes import STOPPED, TAKEN_OVER, USER_ERROR
from megatron_rpp.parallel.failures import Failure, causes
from megatron_rpp.slurm import client, step_processes
from megatron_rpp.slurm.allocation import Allocation
from megatron_rpp.slurm.conclusion import Ending, conclude
from megatron_rpp.slurm.history import Try, is_complete, steps_done
from megatron_rpp.slurm.node_watch import NodeWatch, beat_s
from megatron_rpp.slurm.preflight import examine
from megatron_rpp.slurm.replacement import Replacement
from megatron_rpp.slurm.step_processes import Lasting
from megatron_rpp.slurm.steps import REGISTRY, Steps
from megatron_rpp.slurm.time_limit import seconds_left

logger = logging.getLogger("megatron_rpp.slurm")

_POLL_S = 0.2
_GRACE_S = 15.0
_REFUSED = "the servers refused the configuration; see logs/serve-*.txt in the run directory"
_LAST_SECONDS = 60.0  # before the time limit: enough to end the steps and to requeue


class Supervisor:
    """One start of a job, from its batch script. `run` returns the script's exit code."""

    def __init__(self, config: Config, allocation: Allocation, words: Sequence[str]) -> None:
        self._config, self._allocation, self._words = config, allocation, tuple(words)
        self._run_dir = Path(config.run.dir)
        self._steps = Steps(config, allocation, self._words)
        self._replacement = Replacement(self._run_dir, allocation.attempt)
        self._history = self._replacement.history
        self._deadline_s = config.watchdog.heartbeat_deadline_s
        self._signals: list[int] = []
        self._is_told = False  # the trainer, to save and stop
        self._end_at = math.inf  # monotonic seconds: then it is too late to save
        self._lost_servers: set[str] = set()

    def run(self) -> int:
        """Until the trainer ends, and the job is done, given up, or in the queue again."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        (self._run_dir / "logs").mkdir(parents=True, exist_ok=True)
        if other := self._other_job():
            logger.error("run.dir=%s is in use by job %s; choose another --run.dir", self._run_dir, other)
            return USER_ERROR
        first_step = steps_done(self._run_dir)
        self._history.begin(self._allocation.attempt, self._allocation.nodes, first_step)
        try:
            self._replacement.save(self._allocation, self._words, self._config.slurm.max_tries)
        except client.SlurmError as error:
            logger.warning("after the loss of a node this job could not be submitted anew: %s", error)
        ending = self._preflight() or self._run_steps()
        if ending.is_users_mistake and first_step:  # it could run before: not the user's
            ending = replace(ending, is_users_mistake=False)
        last_step = steps_done(self._run_dir)
        self._history.end(self._allocation.attempt, ending.kind, ending.cause, last_step, ending.bad_nodes, ending.host)
        return conclude(ending, self._allocation, self._replacement, self._config)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _other_job(self) -> str | None:
        """A job that runs in the same folder: two array tasks with one run.dir, say."""
        before = self._history.tries()[-1:]
        if not before or before[0].ending != Try.RUNNING:
            return None
        job_id = before[0].attempt.partition(".")[0]
        try:
            running = job_id != self._allocation.job_id and client.job_state(job_id) == "RUNNING"
        except client.SlurmError:  # it is not known any more
            return None
        return job_id if running else None

    def _preflight(self) -> Ending | None:
        """Where the doctor finds that the job cannot run, and whether it could without some of its nodes."""
        if not self._config.slurm.doctor:
            return None
        checkup = examine((*self._words, REGISTRY), self._run_dir)
        if self._signals:
            return Ending(Try.STOPPED, "told to stop before anything was started")
        if checkup is None:
            logger.warning("rpp doctor came to no conclusion; going on without")
            return None
        if checkup.has_passed:
            return None
        return Ending(Try.FAILED, checkup.cause, checkup.bad_nodes, is_users_mistake=not checkup.bad_nodes)

    def _run_steps(self) -> Ending:
        watch = NodeWatch(self._allocation.nodes, self._deadline_s)
        attempt = self._allocation.attempt
        lasting: list[Lasting] = []
        trainer: list[step_processes.Step] = []
        try:
            guard = self._steps.guard(self._allocation.batch_host, watch.port)
            lasting.append(Lasting("guard", lambda: step_processes.start(guard, attempt)))
            lasting.append(Lasting("serve", lambda: step_processes.start(self._steps.serve(), attempt)))
            trainer.append(step_processes.start(self._steps.train(), attempt))
            return self._watch(trainer[0], lasting, watch)
        finally:
            watch.close()
            step_processes.end([*trainer, *(step.process for step in lasting)])

    def _watch(self, train: step_processes.Step, lasting: Sequence[Lasting], watch: NodeWatch) -> Ending:
        """Until the trainer has ended, or cannot end by itself."""
        next_look = 0.0
        while (code := train.poll()) is None:
            if self._signals and (ending := self._tell(train)):
                return ending
            if time.monotonic() > next_look:
                next_look = time.monotonic() + 1.0
                with contextlib.suppress(OSError):  # a full disk is the trainer's to complain about
                    self._replacement.is_alive_file.touch()
                if ending := self._look(lasting, watch):
                    return ending
            time.sleep(_POLL_S)
        return self._ending(code, watch)

    def _tell(self, train: step_processes.Step) -> Ending | None:
        """Ask the trainer to save and stop; an Ending where there is nothing to save, or no time left."""
        if not self._is_told:
            logger.warning("%s: saving at the next safe point", signal.Signals(self._signals[0]).name)
            if not self._is_training():
                return Ending(Try.STOPPED, "told to stop before the first step")
            train.send_signal(signal.SIGUSR1)  # srun passes it on to the ranks
            self._is_told = True
            self._end_at = time.monotonic() + seconds_left(self._allocation.job) - _LAST_SECONDS
        if time.monotonic() > self._end_at:
            return Ending(
                Try.FAILED,
                "no safe point came before the time limit: slurm.checkpoint_before_end_s="
                f"{self._config.slurm.checkpoint_before_end_s} must be above the longest step",
            )
        return None

    def _is_training(self) -> bool:
        """Whether all ranks are there; before that the signal would end them."""
        try:
            told = json.loads((self._run_dir / "attempt").read_text())
        except (OSError, ValueError):
            return False
        return bool(told["attempt"] == self._allocation.attempt)

    def _look(self, lasting: Sequence[Lasting], watch: NodeWatch) -> Ending | None:
        for step in lasting:
            if step.has_users_mistake:
                return Ending(Try.FAILED, _REFUSED, is_users_mistake=True)
            step.look()
        if self._lost_trainer_nodes(watch):
            time.sleep(3 * beat_s(self._deadline_s))  # those that are lost together are not found at once
            lost = self._lost_trainer_nodes(watch)
            return self._loss(lost, f"node {', '.join(lost)} is lost")
        found = causes(self._run_dir, self._allocation.attempt)
        if found and time.time() - max(each.time for each in found) > 2 * self._deadline_s + _GRACE_S:
            return Ending(Try.FAILED, str(found[0]), host=found[0].host)  # told long ago, and the step goes on
        return None

    def _ending(self, code: int, watch: NodeWatch) -> Ending:
        if code == 0 and is_complete(self._config):  # srun can return 0 for a lost node
            return Ending(Try.DONE)
        if code == STOPPED:
            return Ending(Try.STOPPED, "stopped at a safe point")
        found = causes(self._run_dir, self._allocation.attempt)
        cause = str(found[0]) if found else f"the trainer's step ended with exit code {code}"
        # A peer that has lost a whole node ends first; its guard falls silent a little later.
        lost = self._wait_for_lost(watch) if any(each.kind in ("lost", "peer") for each in found) else ()
        if lost:
            return self._loss(lost, f"node {', '.join(lost)} is lost; {cause}")
        return Ending(
            Try.FAILED,
            cause,
            self._twice_bad(found),
            host=found[0].host if found else "",
            is_users_mistake=code == USER_ERROR,
            is_final=code == TAKEN_OVER,
        )

    def _wait_for_lost(self, watch: NodeWatch) -> tuple[str, ...]:
        end = time.monotonic() + self._deadline_s
        while not (lost := self._lost_trainer_nodes(watch)) and time.monotonic() < end:
            time.sleep(_POLL_S)
        return lost

    def _lost_trainer_nodes(self, watch: NodeWatch) -> tuple[str, ...]:
        lost = watch.lost()
        for node in set(lost) - set(self._allocation.trainer_nodes) - self._lost_servers:
            logger.warning("node %s is lost, and the servers on it; the others go on", node)
            self._lost_servers.add(node)
        return tuple(node for node in lost if node in self._allocation.trainer_nodes)

    def _loss(self, lost: tuple[str, ...], cause: str) -> Ending:
        """Where most nodes are gone it is this one that is cut off, and a guard on the other side acts."""
        nodes = self._allocation.trainer_nodes
        if 2 * len(lost) > len(nodes):
            return Ending(Try.FAILED, f"{cause}: this node is cut off from the others", is_final=True)
        return Ending(Try.LOST_NODES, cause, lost)

    def _twice_bad(self, found: Sequence[Failure]) -> tuple[str, ...]:
        """The host of the cause, if the try before failed there too: it answers, but something is wrong with it."""
        before = [each for each in self._history.tries() if each.attempt != self._allocation.attempt][-1:]
        is_again = found and before and before[0].is_failure and before[0].host == found[0].host
        return (found[0].host,) if is_again and found[0].host in self._allocation.nodes else ()
