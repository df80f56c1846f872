"""Asks servers for their log-probs of given tokens."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Deadline

Post = Callable[[str, str, dict[str, object], float], dict[str, object]]
"""post(url, endpoint, payload, timeout_s) -> the server's JSON reply; raises RolloutError."""

MAX_RESPONSE = 1024
"""Response tokens that a server scores of one response: it makes logits of all of them at once."""
_MAX_THREADS = 64
_RESERVED = 8  # SGLang takes no input that comes closer to its context length


@dataclass(frozen=True)
class ScoreItem:
    """Tokens to be scored: `ids`, of which those from `start` on are the response. `row` is the caller's own."""

    row: int
    ids: tuple[int, ...]
    start: int


Scored = tuple[ScoreItem, list[float]]
"""An item, and the log-prob of each of its response tokens."""


def shortened(row: int, prompt: Sequence[int], response: Sequence[int], context_length: int) -> ScoreItem:
    """Prompt and as much of the response as a server scores."""
    room = min(MAX_RESPONSE, context_length - _RESERVED - len(prompt))
    return ScoreItem(row, (*prompt, *response[: max(room, 0)]), len(prompt))


def share_of(urls: Sequence[str], replica: int, replicas: int) -> Sequence[str]:
    """The servers that this replica asks: together the replicas ask each server, and each replica one at least."""
    return urls[replica::replicas] or ([urls[replica % len(urls)]] if urls else [])


def assign(sequences: Sequence[ScoreItem], urls: Sequence[str]) -> dict[str, list[ScoreItem]]:
    """Which server scores which: in turn, and every server at least one."""
    given: dict[str, list[ScoreItem]] = {url: [] for url in urls}
    usable = [s for s in sequences if len(s.ids) > s.start]
    for i in range(max(len(usable), len(urls)) if usable and urls else 0):
        given[urls[i % len(urls)]].append(usable[i % len(usable)])
    return given


def rescore(
    post: Post, given: dict[str, list[ScoreItem]], deadline: Deadline
) -> tuple[dict[str, list[Scored]], list[str]]:
    """(the servers' log-probs at temperature 1, by URL; a line for each server that failed, or is late)."""
    with ThreadPoolExecutor(min(max(len(given), 1), _MAX_THREADS)) as pool:
        asked = {url: pool.submit(_score_all, post, url, items, deadline) for url, items in given.items()}
    scored, failed = {}, []
    for url, future in asked.items():
        try:
            scored[url] = future.result()
        except RolloutError as error:
            failed.append(f"not scored again: {error}")
        except Exception as error:  # JSON of another shape
            failed.append(f"not scored again: {url}/generate: {type(error).__name__}: {error}")
    return scored, failed


def _score_all(post: Post, url: str, items: Sequence[ScoreItem], deadline: Deadline) -> list[Scored]:
    scored: list[Scored] = []
    for item in items:
        if deadline.is_over():
            raise RolloutError(f"{url}/generate: {len(scored)} of {len(items)} responses in {deadline.seconds:g} s")
        scored.append((item, logprobs_of(url, item, post(url, "generate", _payload(item), deadline.left_s()))))
    return scored


def _payload(item: ScoreItem) -> dict[str, object]:
    return {
        "input_ids": list(item.ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": item.start - 1,
        "extra_key": f"rpp-parity-{uuid.uuid4().hex}",  # a prefix cache of its own: everything is computed anew
    }


def logprobs_of(url: str, item: ScoreItem, reply: dict[str, Any]) -> list[float]:
    """The response's log-probs in SGLang's reply. Raises RolloutError where they are not there."""
    entries = (reply.get("meta_info") or {}).get("input_token_logprobs") or []
    wanted = item.ids[item.start :]
    tail = entries[-len(wanted) :]
    # SGLang (0.5.23) writes the vocabulary's last id as 0 here; the log-prob is the right one.
    is_same = len(tail) == len(wanted) and all(e[1] in (w, 0) for e, w in zip(tail, wanted, strict=True))
    if not is_same or any(entry[0] is None for entry in tail):
        raise RolloutError(f"{url}/generate: no log-probs of the {len(wanted)} tokens asked for: {str(reply)[:300]}")
    return [float(entry[0]) for entry in tail]
