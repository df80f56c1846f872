"""A rollout engine whose servers always hold the policy's current weights, or do not serve."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

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
from megatron_rpp.rollout.recorded import generate_recorded
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.phases import Phases
from megatron_rpp.weight_sync.shared_fleet import SharedFleet
from megatron_rpp.weight_sync.transaction import SyncReport, Transaction
from megatron_rpp.weight_sync.transport import OutOfStepError, Transport, WeightSyncError
from megatron_rpp.weight_sync.verification import Verification

logger = logging.getLogger(__name__)


class SyncedRolloutEngine:
    """Sampling and weight sync for the whole job. Every method is a collective over all ranks.

    Servers may die, be started again, join and leave: what serves has been brought to `policy_version` and
    verified. A failed sync is tried on the next transport; after `rollout.max_retries` the error is raised
    on every rank.
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
        self._dtype, self._journal = dtype, journal
        self._phases = Phases(policy.parallel.store, self._config.deadline_s)
        self._fleet = SharedFleet(fleet, self._phases, config.rollout)
        self.policy_version = UNSYNCED  # of the policy's weights, and of the serving servers
        self.last_sync: SyncReport | None = None

    def wait_ready(self) -> None:
        """Wait until every server answers. Raises RolloutError on every rank where one does not."""
        self._fleet.wait_ready()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]:
        """This replica's share of the responses: prompts dp_rank, dp_rank + dp_size, ... of `prompts`.

        Raises RolloutError where no server can be brought to the current weights, or none samples.
        """
        parallel = self._policy.parallel
        mine = range(len(prompts))[parallel.dp_rank :: parallel.dp_size]
        for attempt in range(self._rollout.max_retries + 1):
            self._admit_newcomers()
            rollouts, error = self._try_generate(prompts, mine, sampling, progress)
            outcomes = gather_objects((error, self._client.suspects))
            self._fleet.suspect(url for _, urls in outcomes for url in urls)
            failed = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text)
            if not failed:
                return rollouts
            logger.warning("sampling failed, attempt %d: %s", attempt + 1, failed)
        raise RolloutError(f"sampling failed {self._rollout.max_retries + 1} times; the last error: {failed}")

    def sync(self, policy_version: int) -> None:
        """Bring every server to the policy's weights, as `policy_version`.

        Raises WeightSyncError where that cannot be done: training must not go on.
        """
        self.policy_version = policy_version  # of the weights from here on, whatever becomes of the servers
        self._client.urls = ()
        self._bring(self._fleet.servers(), policy_version)
        self._serve()

    def verify_weights(self) -> list[str]:
        """Compare every tensor of every serving server with the policy, which must be at `policy_version`.

        One line for each server that differs, with its tensors; none where all are equal. Raises WeightSyncError
        where a server could not be asked.
        """
        config = replace(self._config, verify="full")
        verification = Verification(self._policy.hf, self._serving(), self.policy_version, config)
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
        """Servers on the trainer's GPUs give their memory back until the next sync (rollout.release_memory)."""
        if self._rollout.release_memory:
            self._fleet.release_memory()

    def close(self) -> None:
        """Let go of the servers, which run on. Not a collective."""
        for transport in self._transports:
            transport.close()

    def _try_generate(
        self, prompts: Sequence[Prompt], mine: range, sampling: SamplingParams, progress: ProgressCallback | None
    ) -> tuple[list[Rollout], str | None]:
        """(responses to the prompts at the positions `mine`, what went wrong)."""
        picked = [prompts[i] for i in mine]
        self._client.suspects.clear()
        try:
            rollouts = from_replica_leader(
                self._policy.parallel, lambda: self._sample(picked, mine, sampling, progress)
            )
        except Exception as error:  # whatever it is: the other replicas wait to hear of it
            return [], words_of(error, RolloutError)
        assert {r.policy_version for r in rollouts} <= {self.policy_version}, "the client takes no other version"
        return rollouts, None

    def _sample(
        self, prompts: Sequence[Prompt], group_ids: range, sampling: SamplingParams, progress: ProgressCallback | None
    ) -> list[Rollout]:
        if self._journal is None:
            return self._client.generate(prompts, sampling, progress, group_ids=group_ids)
        version, client, journal = self.policy_version, self._client, self._journal
        return generate_recorded(client, journal, prompts, sampling, progress, group_ids=group_ids, version=version)

    def _admit_newcomers(self) -> None:
        """Servers that joined, came back or answered wrongly are brought to the current weights before they serve."""
        servers = self._fleet.servers()
        newcomers = [server for server in servers if server.version != self.policy_version]
        if newcomers or self._fleet.has_released_memory:
            wanted = list(servers) if self._fleet.has_released_memory else newcomers
            logger.info("bringing %s to version %d", ", ".join(s.url for s in wanted), self.policy_version)
            try:
                self._bring(wanted, self.policy_version)
            except WeightSyncError as error:
                if isinstance(error, OutOfStepError) or not self._serving():
                    raise
                self._fleet.drop(wanted, str(error))  # the others go on
        self._serve()

    def _bring(self, servers: Sequence[Server], version: int) -> None:
        """Sync `servers`, or those of them that are still there, to `version`."""
        error: WeightSyncError | None = None
        for attempt in range(self._rollout.max_retries + 1):
            transport = self._transports[min(attempt, len(self._transports) - 1)]
            try:
                self.last_sync = self._transaction(servers, version, transport, is_first=attempt == 0).run()
                self._fleet.mark(servers, version)
                return
            except OutOfStepError:
                raise
            except WeightSyncError as caught:
                error = caught
                logger.warning("weight sync to version %d by %s failed: %s", version, transport.name, error)
                self._fleet.suspect(error.servers)
                servers = self._still_wanted(servers, version)
                if not servers:
                    return
        raise WeightSyncError(f"policy version {version}: {error}", error.failures if error else ()) from error

    def _still_wanted(self, servers: Sequence[Server], version: int) -> list[Server]:
        """Who of `servers` lives, or has come anew; none where others serve `version` already."""
        alive = self._fleet.servers()
        wanted = {server.url for server in servers}
        left = [server for server in alive if server.url in wanted]
        if left or any(server.version == version for server in alive):
            return left
        return list(alive)

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

    def _serving(self) -> list[Server]:
        return [server for server in self._fleet.known if server.version == self.policy_version]

    def _serve(self) -> None:
        self._client.urls = tuple(server.url for server in self._serving())
        self._client.version = self.policy_version
