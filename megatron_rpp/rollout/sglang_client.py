"""Samples responses from running SGLang servers over HTTP: one `/generate` request a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.http import HttpFailure, reply_message
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutError, SamplingParams
from megatron_rpp.rollout.replies import check_samples, other_versions, to_rollout
from megatron_rpp.rollout.server_pool import ServerLost, ServerPool

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0
Samples = list[dict[str, Any]]
PromptCallback = Callable[[int, list[Rollout]], None]  # (position of the prompt in `prompts`, its rollouts)


class SGLangClient:
    """`generate` spreads the prompts over `urls`; a server that dies or falls silent meanwhile is done without."""

    def __init__(self, urls: Sequence[str], rollout: RolloutConfig, decode: Callable[[Sequence[int]], str]) -> None:
        self.urls = tuple(urls)  # of the serving ones; may be set later, once the servers are up
        self.version: int | None = None  # policy version that every sampled token must come from; None: any
        self.suspects: set[str] = set()  # URLs that the last `generate` doubts: dead, silent, of another version
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
        self.suspects = set()
        if not self.urls:
            raise RolloutError("no SGLang server to sample from: SGLangClient.urls is empty")
        group_ids = range(len(prompts)) if group_ids is None else group_ids
        payloads = generate_payloads(prompts, group_ids, sampling, self._rollout.context_length)

        def complete(index: int, samples: Samples) -> list[Rollout]:
            prompt, stop_ids = prompts[index], sampling.stop_token_ids
            rollouts = [to_rollout(prompt, group_ids[index], sample, self._decode, stop_ids) for sample in samples]
            if on_prompt is not None:
                on_prompt(index, rollouts)
            return rollouts

        results = asyncio.run(self._send_all(payloads, group_ids, complete, progress))
        return [rollout for rollouts in results for rollout in rollouts]

    async def _send_all(
        self,
        payloads: Sequence[dict[str, Any]],
        turns: Sequence[int],
        complete: Callable[[int, Samples], list[Rollout]],
        progress: ProgressCallback | None,
    ) -> list[list[Rollout]]:
        asked, done = sum(len(payload["input_ids"]) for payload in payloads), 0
        free = asyncio.Semaphore(self._rollout.max_concurrent_requests)
        async with _open_session() as session:
            pool = ServerPool(self.urls, self._rollout.health_deadline_s, session)

            async def one(index: int) -> list[Rollout]:
                nonlocal done
                async with free:
                    samples = await self._send(pool, session, payloads[index], turns[index])
                rollouts = complete(index, samples)
                done += len(samples)
                if progress is not None:
                    progress(done, asked)
                return rollouts

            try:
                async with (
                    asyncio.timeout(self._rollout.request_deadline_s),
                    pool.watched(),
                    asyncio.TaskGroup() as all_,
                ):
                    tasks = [all_.create_task(one(index)) for index in range(len(payloads))]
            except TimeoutError as error:
                raise RolloutError(
                    f"{done} of {asked} responses came from {', '.join(self.urls)} within "
                    f"rollout.request_deadline_s={self._rollout.request_deadline_s:g} s"
                ) from error
            except ExceptionGroup as group_error:
                raise group_error.exceptions[0] from None  # the others were cancelled or say the same
            finally:
                self.suspects = pool.suspects
        return [task.result() for task in tasks]

    async def _send(
        self, pool: ServerPool, session: aiohttp.ClientSession, payload: dict[str, Any], turn: int
    ) -> Samples:
        """One prompt's samples, from the first server that gives them.

        It may fail max_retries + 1 times, but is tried on every server that is left. Servers given up do not count.
        """
        failed: list[str] = []  # URLs
        while True:
            server = pool.pick(turn, failed)
            if again := failed.count(server.url):
                await asyncio.sleep(min(_FIRST_BACKOFF_S * 2 ** (again - 1), _MAX_BACKOFF_S))
            try:
                samples = await pool.run(server, _request(session, server.url, payload))
            except ServerLost:
                continue
            except aiohttp.ClientConnectorError as error:
                pool.give_up(server, str(error))
            except (aiohttp.ClientError, OSError, HttpFailure, ValueError) as error:
                cause = f"{server.url}/generate: {str(error) or type(error).__name__}"
                if isinstance(error, HttpFailure) and not error.is_transient:
                    raise RolloutError(cause) from error
                failed.append(server.url)
                server.failures, server.has_failed_last = server.failures + 1, True
                self._raise_if_hopeless(pool, failed, cause)
            else:
                server.has_failed_last = False
                if self.version is None or not (others := other_versions(samples, self.version)):
                    return samples
                pool.give_up(server, f"samples from version {min(others)}, not {self.version}")

    def _raise_if_hopeless(self, pool: ServerPool, failed: Sequence[str], cause: str) -> None:
        left = pool.left()
        if len(failed) > self._rollout.max_retries and all(server.url in failed for server in left):
            for server in left:
                pool.give_up(server, cause)
            raise RolloutError(f"{cause} (after rollout.max_retries={self._rollout.max_retries} retries)")


def _open_session() -> aiohttp.ClientSession:
    # A connection is used once: SGLang closes idle ones after 5 s, and a request that met this would look like
    # one that the server has lost. The deadline of the whole call is the only one.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def _request(session: aiohttp.ClientSession, url: str, payload: dict[str, Any]) -> Samples:
    async with session.post(f"{url.rstrip('/')}/generate", json=payload) as response:
        if response.status != 200:
            raise HttpFailure(response.status, reply_message(await response.text()))
        samples = check_samples(await response.json(content_type=None))
    asked = len(payload["input_ids"])
    if len(samples) != asked:
        raise RolloutError(f"{url}/generate: {len(samples)} samples of {asked} asked came back")
    return samples
