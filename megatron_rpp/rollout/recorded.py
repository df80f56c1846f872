"""Sampling with a journal: what it has is not sampled again, and what is sampled goes into it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.journal import Journal, request_key
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import ProgressCallback, SamplingParams
from megatron_rpp.rollout.sampler import Flight
from megatron_rpp.rollout.sglang_client import SampleGroup, SGLangClient

logger = logging.getLogger(__name__)


class RecordedClient:
    """A client, and on replica leaders the journal of what it samples; without one it is the client alone."""

    def __init__(self, client: SGLangClient, journal: Journal | None) -> None:
        self._client, self._journal = client, journal

    @property
    def flights(self) -> list[Flight]:
        """The requests of the last sampling."""
        return self._client.flights

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        progress: ProgressCallback | None,
        *,
        group_ids: Sequence[int],
    ) -> list[Rollout]:
        """As the client's, which is asked for the prompts that the journal lacks at its policy version."""
        journal, version = self._journal, self._client.version
        if journal is None or version is None:
            return self._client.generate(prompts, sampling, progress, group_ids=group_ids)
        payloads = generate_payloads(prompts, group_ids, sampling, self._client.context_length)
        keys = [request_key(payload) for payload in payloads]
        found = [journal.find(version, *known) for known in zip(keys, prompts, group_ids, strict=True)]
        wanted = [index for index, rollouts in enumerate(found) if rollouts is None]
        if num_known := len(prompts) - len(wanted):
            logger.info("version %d: %d of %d prompts are in the journal", version, num_known, len(prompts))
        each = sampling.num_samples_per_prompt
        known, asked = num_known * each, len(prompts) * each

        def keep(place: int, rollouts: list[Rollout]) -> None:
            index = wanted[place]
            found[index] = rollouts
            journal.add(version, keys[index], rollouts)

        if progress is not None and known:
            progress(known, asked)
        if wanted:
            self._client.generate(
                [prompts[index] for index in wanted],
                sampling,
                progress and (lambda done, _: progress(known + done, asked)),
                group_ids=[group_ids[index] for index in wanted],
                on_prompt=keep,
            )
        else:
            self._client.flights = []
        return [rollout for rollouts in found for rollout in rollouts or ()]

    @asynccontextmanager
    async def open(self, sampling: SamplingParams) -> AsyncIterator[SampleGroup]:
        """As the client's; what the journal has comes at once."""
        journal, version = self._journal, self._client.version
        async with self._client.open(sampling) as sample:

            async def recorded(prompt: Prompt, group_id: int, payload: dict[str, Any]) -> list[Rollout]:
                assert journal is not None and version is not None
                key = request_key(payload)
                if (known := journal.find(version, key, prompt, group_id)) is not None:
                    return known
                rollouts = await sample(prompt, group_id, payload)
                journal.add(version, key, rollouts)
                return rollouts

            yield sample if journal is None or version is None else recorded
