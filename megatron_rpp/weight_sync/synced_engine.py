"""A rollout engine whose servers always hold the policy's current weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import from_replica_leader, gather_errors, on_rank_0
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutError, SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.transport import Transport, WeightSyncError

logger = logging.getLogger(__name__)


class SyncedRolloutEngine:
    """Sampling and weight sync for the whole job. Every method is a collective over all ranks.

    When a server dies it is restarted, brought to the current weights, and asked again; after
    `max_retries` restarts in one call the error is raised on every rank.
    """

    def __init__(
        self,
        policy: Model,
        fleet: ServerFleet,
        client: SGLangClient,
        transport: Transport,
        *,
        deadline_s: float,
        max_retries: int,
    ) -> None:
        self._policy, self._fleet, self._client, self._transport = policy, fleet, client, transport
        self._deadline_s, self._max_retries = deadline_s, max_retries
        self.policy_version = -1  # of the weights that the servers hold; -1: not synced yet

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]:
        """This replica's share of the responses: prompts dp_rank, dp_rank + dp_size, ... of `prompts`.

        Raises RolloutError where a server cannot be brought back, or samples from a version that is not
        the one it was given.
        """
        parallel = self._policy.parallel
        mine = range(len(prompts))[parallel.dp_rank :: parallel.dp_size]
        for attempt in range(self._max_retries + 1):
            rollouts, error = self._try_generate(prompts, mine, sampling, progress)
            failed = gather_errors(error)
            if failed is None:
                return rollouts
            if attempt < self._max_retries:
                self._recover(failed)
        raise RolloutError(f"sampling failed {self._max_retries + 1} times; the last error: {failed}")

    def sync(self, policy_version: int) -> None:
        """Bring every server to the policy's weights, under `policy_version`.

        Raises WeightSyncError where that cannot be done: training must not go on.
        """
        for attempt in range(self._max_retries + 1):
            try:
                self._sync_once(policy_version)
                return
            except (WeightSyncError, RolloutError) as error:
                if attempt == self._max_retries:
                    raise WeightSyncError(f"policy version {policy_version}: {error}") from error
                logger.warning("weight sync failed: %s", error)
                self._transport.close()
                self._fleet.revive()

    def _try_generate(
        self, prompts: Sequence[Prompt], mine: range, sampling: SamplingParams, progress: ProgressCallback | None
    ) -> tuple[list[Rollout], str | None]:
        """(responses to the prompts at the positions `mine`, what went wrong)."""
        picked = [prompts[i] for i in mine]
        try:
            rollouts = from_replica_leader(
                self._policy.parallel, lambda: self._client.generate(picked, sampling, progress, group_ids=mine)
            )
        except RolloutError as error:
            return [], str(error)
        stale = {r.policy_version for r in rollouts} - {self.policy_version}
        return rollouts, f"sampled by versions {stale}, not {self.policy_version}" if stale else None

    def _recover(self, error: str) -> None:
        logger.warning("sampling failed: %s", error)
        self._transport.close()  # its group, if any, held the dead server
        self._fleet.revive()
        self.sync(self.policy_version)

    def _sync_once(self, version: int) -> None:
        self._transport.send(self._policy, self._client.urls)
        on_rank_0(lambda: self._name_version(version), expect=RolloutError, raises=WeightSyncError)
        self.policy_version = version

    def _name_version(self, version: int) -> None:
        """The cache belongs to the old weights; then the servers say which weights they hold."""
        for url in self._client.urls:
            self._client.flush_cache(url)
            self._client.post(url, "update_weight_version", {"new_version": str(version)}, self._deadline_s)
