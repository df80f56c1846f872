"""A rollout engine whose servers always hold the policy's current weights, or do not serve."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import UNSYNCED, Prompt, Rollout
from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import takes_part_in_export
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects, words_of
from megatron_rpp.rollout.fleet import Server, ServerFleet
from megatron_rpp.rollout.journal import Journal
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutError, SamplingParams
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.sampler import Flight
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.participants import parted, still_wanted
from megatron_rpp.weight_sync.phases import Phases
from megatron_rpp.weight_sync.server_checks import check_servers
from megatron_rpp.weight_sync.shared_fleet import SharedFleet
from megatron_rpp.weight_sync.transaction import SyncReport, Transaction
from megatron_rpp.weight_sync.transport import OutOfStepError, Transport, WeightSyncError
from megatron_rpp.weight_sync.verification import Verification

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SyncedRolloutEngine:
    """Sampling and weight sync for the whole job. Every method is a collective over all ranks.

    Servers may die, be started again, join and leave: what serves has been brought to `policy_version` and
    verified. A failed sync is tried on the next transport, the last time without the servers that every try has
    named (two at least), if there are others; after `rollout.max_retries` the error is raised on every rank. Servers
    that join while others serve get one try.
    """

    def __init__(
        self,
        policy: Model,
        fleet: ServerFleet | None,
        client: SGLangClient,
        transports: Sequence[Transport],
        config: Config,
        dtype: torch.dtype | None,
        journal: Journal | None = None,
    ) -> None:
        """fleet: on rank 0. transports: in the order in which they are tried. dtype: of the servers' weights.

        journal: on replica leaders, of what is sampled; None: none is kept.
        """
        self._policy, self._client, self._transports = policy, client, tuple(transports)
        self._rollout, self._config = config.rollout, config.weight_sync
        self._dtype, self._recorded = dtype, RecordedClient(client, journal)
        self._phases = Phases(policy.parallel.store, self._config.deadline_s)
        self._fleet = SharedFleet(fleet, self._phases, config.rollout)
        self._failed_newcomers = 0  # in a row: tries of servers that joined while others served
        self.policy_version = UNSYNCED  # of the policy's weights, and of the serving servers
        self.last_sync: SyncReport | None = None

    def wait_ready(self) -> None:
        """Wait until every server answers. Raises RolloutError on every rank where one does not.

        Raises ConfigError where one holds its weights so that no sync could verify them.
        """
        self._fleet.wait_ready()
        if self._config.verify != "off":
            check_servers(self._fleet.known, self._dtype, self._config.unverified)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        progress: ProgressCallback | None = None,
        *,
        group_ids: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """This replica's share of the responses: prompts dp_rank, dp_rank + dp_size, ... of `prompts`.

        group_ids: `prompts` are this replica's own, and none is shared out; their positions in the global batch.

        Raises RolloutError where no server can be brought to the current weights, or none samples.
        """
        mine: Sequence[int] = range(len(prompts))
        if group_ids is None:
            mine = mine[self._policy.parallel.dp_rank :: self._policy.parallel.dp_size]
        picked = [prompts[i] for i in mine]
        numbers = mine if group_ids is None else group_ids
        rollouts = self.with_retries(lambda client: client.generate(picked, sampling, progress, group_ids=numbers))
        assert {r.policy_version for r in rollouts} <= {self.policy_version}, "the client takes no other version"
        return rollouts

    def with_retries(self, sample: Callable[[RecordedClient], T]) -> T:
        """What `sample` gives on this replica's leader, with servers that hold the current weights.

        Where it raises on any leader it is called again on all of them: it must then know what it has already.
        Raises RolloutError where no server can be brought to the current weights, or it fails too often.
        """
        for number in range(1, self._rollout.max_retries + 2):
            self._admit_newcomers()
            result, error = self._try(sample)
            outcomes = gather_objects((error, self._client.suspects))
            self._fleet.suspect(url for _, urls in outcomes for url in urls)
            failed = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text)
            if not failed:
                return result  # type: ignore[return-value] # set where there is no error
            logger.warning("sampling failed, try %d: %s", number, failed)
        raise RolloutError(f"sampling failed {self._rollout.max_retries + 1} times; the last error: {failed}")

    def sync(self, policy_version: int) -> None:
        """Bring every server to the policy's weights, as `policy_version`.

        Raises WeightSyncError where that cannot be done: training must not go on.
        """
        self.policy_version = policy_version  # of the weights from here on, whatever becomes of the servers
        self._client.urls = ()
        servers = self._fleet.servers()
        # Newcomers are brought alone, before the next sampling: one that cannot be must not fail the others' sync.
        self._bring([server for server in servers if server.is_synced] or servers, policy_version)
        self._serve()

    @property
    def flights(self) -> list[Flight]:
        """On a replica's leader: the requests of its last sampling."""
        return self._recorded.flights

    def verify_weights(self) -> list[str]:
        """Compare every tensor of every serving server with the policy, which must be at `policy_version`.

        One line for each server that differs, with its tensors; none where all are equal. Raises WeightSyncError
        where a server could not be asked.
        """
        config = replace(self._config, verify="full")
        verification = Verification(self._policy, self._serving(), self.policy_version, self._dtype, config)
        is_leader, deadline = self._policy.parallel.is_stage_leader, self._phases.deadline("verify")
        gather = partial(self._phases.gather_shards, deadline)
        export = StageExport(self._policy, self._dtype, gather, verification.add if is_leader else None)
        look: Callable[[object], object] = lambda _: deque(export.tensors(), maxlen=0)  # noqa: E731
        self._phases.run(deadline, look if takes_part_in_export(self._policy) else None)
        try:
            verification.run(self._phases, is_leader=is_leader)
        except WeightSyncError as error:
            different = [str(failure) for failure in error.failures if failure.tensors]
            if not different:
                raise
            return different
        return []

    def release_memory(self) -> None:
        """Servers on the trainer's GPUs give their memory back until the next sync (rollout.release_memory), once."""
        if self._rollout.release_memory and not self._fleet.has_released_memory:
            self._fleet.release_memory()

    def close(self) -> None:
        """Let go of the servers, which run on. Not a collective."""
        for transport in self._transports:
            transport.close()

    def _try(self, sample: Callable[[RecordedClient], T]) -> tuple[T | None, str | None]:
        """(what `sample` gives, what went wrong)."""
        self._client.suspects.clear()
        try:
            return from_replica_leader(self._policy.parallel, lambda: sample(self._recorded)), None
        except Exception as error:  # whatever it is: the other replicas wait to hear of it
            return None, words_of(error, RolloutError)

    def _admit_newcomers(self) -> None:
        """Servers that joined, came back or answered wrongly are brought to the current weights before they serve."""
        servers = self._fleet.servers()
        newcomers = [server for server in servers if server.version != self.policy_version]
        if newcomers or self._fleet.has_released_memory:
            wanted = list(servers) if self._fleet.has_released_memory else newcomers
            logger.info("bringing %s to version %d", ", ".join(s.url for s in wanted), self.policy_version)
            if self._fleet.has_released_memory or not self._serving():
                self._bring(wanted, self.policy_version)
            else:
                self._try_newcomers(wanted)
        self._serve()

    def _try_newcomers(self, servers: Sequence[Server]) -> None:
        """Bring `servers` while others serve, which wait: once, and whom the error names is dropped.

        The next time, then, on the next transport: the first may be one that a server cannot be reached by.
        """
        start, transport = time.monotonic(), self._transports[self._failed_newcomers % len(self._transports)]
        try:
            self._sync_by(transport, servers, self.policy_version)
            self._failed_newcomers = 0
        except OutOfStepError:
            raise
        except WeightSyncError as error:
            self._failed_newcomers += 1
            self._log_failure(self.policy_version, transport, error)
            blamed = [server for server in servers if server.url in error.servers] or servers
            self._fleet.drop(blamed, str(error), time.monotonic() - start)

    def _sync_by(self, transport: Transport, servers: Sequence[Server], version: int, *, is_first: bool = True) -> None:
        self.last_sync = self._transaction(servers, version, transport, is_first=is_first).run()
        self._fleet.mark(servers, version)

    def _bring(self, servers: Sequence[Server], version: int) -> None:
        """Sync `servers`, or those of them that are still there, to `version`."""
        error: WeightSyncError | None = None
        always = {server.url for server in servers}  # whom every error has named
        start = time.monotonic()
        for number in range(self._rollout.max_retries + 1):
            transport = self._transports[min(number, len(self._transports) - 1)]
            try:
                self._sync_by(transport, servers, version, is_first=number == 0)
                return
            except OutOfStepError:
                raise
            except WeightSyncError as caught:
                error = caught
                self._log_failure(version, transport, error)
                self._fleet.suspect(error.servers)
                always &= error.servers
                servers = still_wanted(self._fleet.servers(), servers, version)
                if number + 1 == self._rollout.max_retries and number > 0:  # one bad moment is no proof
                    servers, unfit = parted(servers, always)
                    self._fleet.drop(unfit, f"no try has brought it: {error}", time.monotonic() - start)
                if not servers:
                    return
        raise WeightSyncError(f"policy version {version}: {error}", error.failures if error else ()) from error

    def _transaction(
        self, servers: Sequence[Server], version: int, transport: Transport, *, is_first: bool
    ) -> Transaction:
        config = self._config
        if config.verify == "sample" and not (is_first and all(server.is_synced for server in servers)):
            config = replace(config, verify="full")  # a sample is for servers that were wholly compared before
        return Transaction(
            self._policy,
            tuple(servers),
            version,
            transport,
            self._phases,
            self._dtype,
            config,
            self._fleet.released,
        )

    def _log_failure(self, version: int, transport: Transport, error: WeightSyncError) -> None:
        logger.warning("weight sync to version %d by %s failed: %s", version, transport.name, error)

    def _serving(self) -> list[Server]:
        return [server for server in self._fleet.known if server.version == self.policy_version]

    def _serve(self) -> None:
        self._client.urls = tuple(server.url for server in self._serving())
        self._client.version = self.policy_version
