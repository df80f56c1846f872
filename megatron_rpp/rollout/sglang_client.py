"""Samples responses from running SGLang servers over HTTP: one `/generate` request a prompt."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from megatron_rpp.config.schema import RolloutConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.http import HttpFailure, is_healthy, post_json, reply_message
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutEngine, RolloutError, SamplingParams

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0
_UNSYNCED = -1  # policy version of weights that no sync has named yet


class SGLangClient(RolloutEngine):
    """`generate` spreads the prompts over `urls`; the other methods serve weight sync."""

    def __init__(self, urls: Sequence[str], rollout: RolloutConfig, decode: Callable[[Sequence[int]], str]) -> None:
        self.urls = tuple(urls)  # may be set later, once the servers are up
        self._rollout, self._decode = rollout, decode

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        progress: ProgressCallback | None = None,
        *,
        group_ids: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Rollouts prompt by prompt, `num_samples_per_prompt` in a row.

        `group_ids` are the prompts' positions in the global batch, from which their samples' seeds derive;
        None: `prompts` is the global batch.

        Raises RolloutError when a server refuses a request, when retries did not help, or past
        rollout.request_deadline_s; ValueError for a prompt that fills rollout.context_length.
        """
        if not self.urls:
            raise RolloutError("no SGLang server to sample from: SGLangClient.urls is empty")
        group_ids = range(len(prompts)) if group_ids is None else group_ids
        payloads = generate_payloads(prompts, group_ids, sampling, self._rollout.context_length)
        replies = asyncio.run(self._send_all(payloads, progress))
        return [
            to_rollout(prompt, group_id, sample, self._decode, sampling.stop_token_ids)
            for prompt, group_id, samples in zip(prompts, group_ids, replies, strict=True)
            for sample in samples
        ]

    async def _send_all(
        self, payloads: Sequence[dict[str, Any]], progress: ProgressCallback | None
    ) -> list[list[dict[str, Any]]]:
        asked, done = sum(len(payload["input_ids"]) for payload in payloads), 0
        free = asyncio.Semaphore(self._rollout.max_concurrent_requests)
        timeout = aiohttp.ClientTimeout(total=None)  # the deadline below is the only one
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def one(index: int) -> list[dict[str, Any]]:
                nonlocal done
                async with free:
                    samples = await self._send(session, index, payloads[index])
                done += len(samples)
                if progress is not None:
                    progress(done, asked)
                return samples

            try:
                async with asyncio.timeout(self._rollout.request_deadline_s), asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(index)) for index in range(len(payloads))]
            except TimeoutError as error:
                raise RolloutError(
                    f"{done} of {asked} responses came from {', '.join(self.urls)} within "
                    f"rollout.request_deadline_s={self._rollout.request_deadline_s:g} s"
                ) from error
            except ExceptionGroup as group_error:
                raise group_error.exceptions[0] from None  # the others were cancelled or say the same
        return [task.result() for task in tasks]

    async def _send(self, session: aiohttp.ClientSession, index: int, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """One prompt's samples; a retry goes to the next server."""
        cause = ""
        for attempt in range(self._rollout.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(_FIRST_BACKOFF_S * 2 ** (attempt - 1), _MAX_BACKOFF_S))
            url = self.urls[(index + attempt) % len(self.urls)]
            try:
                samples = await _request(session, url, payload)
            except (aiohttp.ClientError, OSError, HttpFailure, ValueError) as error:
                cause = f"{url}/generate: {str(error) or type(error).__name__}"
                if isinstance(error, HttpFailure) and not error.is_transient:
                    raise RolloutError(cause) from error
            else:
                if len(samples) != len(payload["input_ids"]):
                    asked = len(payload["input_ids"])
                    raise RolloutError(f"{url}/generate: {len(samples)} samples of {asked} asked came back")
                return samples
        raise RolloutError(f"{cause} (after rollout.max_retries={self._rollout.max_retries} retries)")

    def post(self, url: str, endpoint: str, payload: dict[str, object], timeout_s: float) -> dict[str, object]:
        """POST JSON and give the JSON reply. Raises RolloutError with url, endpoint and reply."""
        return post_json(url, endpoint, payload, timeout_s)

    def health(self, url: str, timeout_s: float = 10.0) -> bool:
        """The server answers and its scheduler is alive."""
        return is_healthy(url, timeout_s)

    def flush_cache(self, url: str, timeout_s: float = 30.0) -> None:
        """Drop the prefix cache, which belongs to the old weights; the server refuses while requests run."""
        self.post(url, "flush_cache", {}, timeout_s)


async def _request(session: aiohttp.ClientSession, url: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
    async with session.post(f"{url.rstrip('/')}/generate", json=payload) as response:
        if response.status != 200:
            raise HttpFailure(response.status, reply_message(await response.text()))
        reply = await response.json(content_type=None)
    samples = reply if isinstance(reply, list) else [reply]
    for sample in samples:
        finish = sample["meta_info"]["finish_reason"]["type"] if _is_sample(sample) else "no sample"
        if finish not in ("stop", "length"):
            raise ValueError(f"a response that did not end by itself: {finish}: {str(sample)[:200]}")
    return samples


def _is_sample(sample: Any) -> bool:
    """It has what `to_rollout` reads."""
    meta = sample.get("meta_info") if isinstance(sample, dict) else None
    return isinstance(meta, dict) and "output_token_logprobs" in meta and bool(meta.get("finish_reason"))


def generate_payloads(
    prompts: Sequence[Prompt], group_ids: Sequence[int], sampling: SamplingParams, context_length: int
) -> list[dict[str, Any]]:
    """Bodies of `/generate`, one a prompt, with the prompt repeated and a seed for each sample."""
    payloads = []
    for prompt, group_id in zip(prompts, group_ids, strict=True):
        params = _sampling_params(prompt, sampling, context_length)
        seeds = (sample_seed(sampling.seed, group_id, i) for i in range(sampling.num_samples_per_prompt))
        payloads.append(
            {
                "input_ids": [list(prompt.token_ids)] * sampling.num_samples_per_prompt,
                "sampling_params": [params | {"sampling_seed": seed} for seed in seeds],
                "return_logprob": True,
            }
        )
    return payloads


def _sampling_params(prompt: Prompt, sampling: SamplingParams, context_length: int) -> dict[str, Any]:
    room = context_length - len(prompt.token_ids)
    if room < 1:
        raise ValueError(
            f"rollout.context_length={context_length} leaves no room for a response to prompt "
            f"{prompt.id} of {len(prompt.token_ids)} tokens; raise it or drop the prompt"
        )
    return {
        "max_new_tokens": min(sampling.max_response_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def sample_seed(seed: int, group_id: int, sample_index: int) -> int:
    """Seed of one sample, in [0, 2^63): the same on every data-parallel layout, and after a retry."""
    key = f"{seed}/{group_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def to_rollout(
    prompt: Prompt,
    group_id: int,
    sample: dict[str, Any],
    decode: Callable[[Sequence[int]], str],
    stop_ids: Sequence[int],
) -> Rollout:
    """A Rollout from one sample of SGLang's reply; the decoded text leaves out the final stop token."""
    meta = sample["meta_info"]
    entries = meta["output_token_logprobs"]  # [log-prob, id, text] each
    ids = tuple(int(entry[1]) for entry in entries)
    is_stopped = bool(ids) and ids[-1] in stop_ids
    return Rollout(
        prompt=prompt,
        group_id=group_id,
        response_ids=ids,
        rollout_logprobs=tuple(float(entry[0]) for entry in entries),
        text=decode(ids[:-1] if is_stopped else ids),
        finish_reason=meta["finish_reason"]["type"],
        policy_version=parse_version(meta.get("weight_version")),
    )


def parse_version(weight_version: str | None) -> int:
    """Policy version that a sync wrote as `weight_version`; -1 for a server that was never synced."""
    try:
        return int(weight_version or "")
    except ValueError:
        return _UNSYNCED
