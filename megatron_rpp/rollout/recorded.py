"""Sampling with a journal: what it has is not sampled again, and what is sampled goes into it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.journal import Journal, request_key
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import ProgressCallback, SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient

logger = logging.getLogger(__name__)


def generate_recorded(
    client: SGLangClient,
    journal: Journal,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    progress: ProgressCallback | None,
    *,
    group_ids: Sequence[int],
    version: int,
) -> list[Rollout]:
    """As `client.generate`, which is asked for the prompts that the journal lacks at policy version `version`."""
    payloads = generate_payloads(prompts, group_ids, sampling, client.context_length)
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
        client.generate(
            [prompts[index] for index in wanted],
            sampling,
            progress and (lambda done, _: progress(known + done, asked)),
            group_ids=[group_ids[index] for index in wanted],
            on_prompt=keep,
        )
    return [rollout for rollouts in found for rollout in rollouts or ()]
