"""The key-value store of the job that runs in a run directory, for a process that is none of its ranks."""

from __future__ import annotations

import logging
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_rpp.parallel.environment import node_name
from megatron_rpp.parallel.interfaces import address_towards, is_loopback
from megatron_rpp.parallel.rendezvous_file import Rendezvous, newest_rendezvous

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0
_STORE_S = 5.0  # of any call to it: rank 0 answers at once or is gone


class JobOver(Exception):
    """There is no job to serve, or no more; says why."""


class JobStore:
    """Found, lost and found again: the job may be started anew while this process lives."""

    def __init__(self, run_dir: str, attempt: str | None, patience_s: float) -> None:
        """attempt: the only start of the job to look for; None: the newest. patience_s: how long to do without."""
        self._run_dir, self._attempt, self._patience_s = run_dir, attempt, patience_s
        self._alone_since = time.monotonic()
        self._trouble = "nothing has been started there"
        self._has_found = False
        self.rendezvous: Rendezvous | None = None  # of the job that is connected to
        self.store: dist.Store | None = None  # of that job
        self.own_address = ""  # of this host, on the route to the store

    def look(self) -> dist.Store | None:
        """The store of the job that runs now; None where there is none yet, or none is within reach.

        Raises JobOver once the run has ended, or past patience_s.
        """
        try:
            newest = newest_rendezvous(self._run_dir)
        except OSError as error:  # of a network file system
            logger.warning("run.dir=%s cannot be read: %s", self._run_dir, error)
            return self.store
        if newest is not None and self._attempt is not None and newest.attempt != self._attempt:
            newest = None
        if newest is None and self._has_found:
            raise JobOver(f"the run in run.dir={self._run_dir} has ended")
        if self.store is not None and newest == self.rendezvous:
            return self.store
        if self.store is not None:
            self.lost("another start of the job has taken over")
        if newest is not None:
            self._connect(newest)
        if self.store is None and time.monotonic() - self._alone_since > self._patience_s:
            raise JobOver(
                f"no job was found in run.dir={self._run_dir} for rollout.startup_deadline_s={self._patience_s:g} s: "
                f"{self._trouble}"
            )
        return self.store

    def lost(self, why: object) -> None:
        """The store does not answer: look for it, or for another, from now on."""
        logger.info("the store of job %s is lost: %s", self.rendezvous and self.rendezvous.attempt, why)
        self._alone_since, self.store, self.rendezvous = time.monotonic(), None, None

    def _connect(self, place: Rendezvous) -> None:
        try:
            # torch would try again and again for its whole timeout, where nobody listens.
            socket.create_connection((place.address, place.port), timeout=_CONNECT_S).close()
            store = place.connect(timedelta(seconds=_STORE_S))
            self.own_address = address_towards(place.address, place.port)
        except OSError as error:
            self._trouble = f"{error} (job {place.attempt}, whose rank 0 is on host {place.host})"
            if is_loopback(place.address) and place.host != node_name():
                self._trouble += "; only its own host reaches that: start the job with srun, mpirun or torchrun"
            return
        self.store, self.rendezvous, self._has_found = store, place, True
        logger.info("found job %s, its store is at %s:%d", place.attempt, place.address, place.port)
