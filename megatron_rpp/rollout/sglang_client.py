"""Samples responses from running SGLang servers over HTTP: one `/generate` request a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutError, SamplingParams
from megatron_rpp.rollout.replies import to_rollout
from megatron_rpp.rollout.sampler import Flight, Sampler, open_session
from megatron_rpp.rollout.shared_load import SharedLoad

PromptCallback = Callable[[int, list[Rollout]], None]  # (position of the prompt in `prompts`, its rollouts)
SampleGroup = Callable[[Prompt, int, dict[str, Any]], Awaitable[list[Rollout]]]
"""(prompt, its group_id, body of its request) -> its rollouts."""


class SGLangClient:
    """`generate` spreads the prompts over `urls`; a server that dies or falls silent meanwhile is done without."""

    def __init__(self, urls: Sequence[str], rollout: RolloutConfig, decode: Callable[[Sequence[int]], str]) -> None:
        self.urls = tuple(urls)  # of the serving ones; may be set later, once the servers are up
        self.version: int | None = None  # policy version that every sampled token must come from; None: any
        self.suspects: set[str] = set()  # URLs that the last call doubts: dead, silent, of another version
        self.flights: list[Flight] = []  # of the last call
        self.shared: SharedLoad | None = None  # where several replicas ask the same servers; may be set later
        self._rollout, self._decode = rollout, decode

    @property
    def context_length(self) -> int:
        """Longest prompt plus response, in tokens."""
        return self._rollout.context_length

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        progress: ProgressCallback | None = None,
        *,
        group_ids: Sequence[int] | None = None,
        on_prompt: PromptCallback | None = None,
    ) -> list[Rollout]:
        """Rollouts prompt by prompt, `num_samples_per_prompt` in a row.

        `group_ids` are the prompts' positions in the global batch, from which their samples' seeds derive;
        None: `prompts` is the global batch. `on_prompt` gets each prompt's rollouts as soon as they are complete.

        Raises RolloutError when a server refuses a request, when retries did not help, when no server is
        left, or past rollout.request_deadline_s; ValueError for a prompt that fills rollout.context_length.
        """
        group_ids = range(len(prompts)) if group_ids is None else group_ids
        payloads = generate_payloads(prompts, group_ids, sampling, self._rollout.context_length)
        asked, done = sum(len(payload["input_ids"]) for payload in payloads), 0

        def complete(index: int, rollouts: list[Rollout]) -> None:
            nonlocal done
            if on_prompt is not None:
                on_prompt(index, rollouts)
            done += len(rollouts)
            if progress is not None:
                progress(done, asked)

        try:
            results = asyncio.run(self._generate_all(prompts, group_ids, payloads, sampling, complete))
        except TimeoutError as error:
            raise RolloutError(
                f"{done} of {asked} responses came from {', '.join(self.urls)} within "
                f"rollout.request_deadline_s={self._rollout.request_deadline_s:g} s"
            ) from error
        return [rollout for rollouts in results for rollout in rollouts]

    @asynccontextmanager
    async def open(self, sampling: SamplingParams) -> AsyncIterator[SampleGroup]:
        """What samples one prompt, as often as it is called. Raises RolloutError where no server is known.

        `suspects` and `flights` are those of this phase once it is over. To cancel a call is to abort its samples.
        """
        self.suspects, self.flights = set(), []
        if not self.urls:
            raise RolloutError("no SGLang server to sample from: SGLangClient.urls is empty")
        async with open_session() as session:
            sampler = Sampler(self.urls, self._rollout, self.version, session, self.shared)

            async def sample(prompt: Prompt, group_id: int, payload: dict[str, Any]) -> list[Rollout]:
                samples = await sampler.send(payload, turn=group_id)
                return [to_rollout(prompt, group_id, each, self._decode, sampling.stop_token_ids) for each in samples]

            try:
                async with sampler.pool.watched():
                    yield sample
            finally:
                self.suspects, self.flights = sampler.pool.suspects, sampler.flights
                await sampler.finish()

    async def _generate_all(
        self,
        prompts: Sequence[Prompt],
        group_ids: Sequence[int],
        payloads: Sequence[dict[str, Any]],
        sampling: SamplingParams,
        complete: PromptCallback,
    ) -> list[list[Rollout]]:
        free = asyncio.Semaphore(self._rollout.max_concurrent_requests)
        async with self.open(sampling) as sample:

            async def one(index: int) -> list[Rollout]:
                async with free:
                    rollouts = await sample(prompts[index], group_ids[index], payloads[index])
                complete(index, rollouts)
                return rollouts

            try:
                async with asyncio.timeout(self._rollout.request_deadline_s), asyncio.TaskGroup() as all_:
                    tasks = [all_.create_task(one(index)) for index in range(len(prompts))]
            except ExceptionGroup as group_error:
                raise group_error.exceptions[0] from None  # the others were cancelled or say the same
        return [task.result() for task in tasks]
