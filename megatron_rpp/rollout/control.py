"""What a sync asks of one SGLang server, beside the weights: its pause, update session, version and checksums.

Every function takes the server's URL and the seconds that it may take, and raises RolloutError with the
endpoint and the server's words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rpp.rollout.http import get_json, post_json
from megatron_rpp.rollout.protocol import RolloutError

UNVERIFIED = "unverified"
"""The version that a server answers with from the start of a sync until its weights are verified."""
MEMORY = ("weights", "kv_cache")
"""What a server gives back and takes again."""
_POLL_S = 0.05
_OF_RANK = {"checksums", "parallelism_info"}


def pause(url: str, mode: str, timeout_s: float) -> None:
    """Sample nothing from here on. mode: what becomes of running requests (weight_sync.pause)."""
    end = time.monotonic() + timeout_s
    if mode == "drain":
        _drain(url, end)
    post_json(url, "pause_generation", {"mode": "retract" if mode == "drain" else mode}, _left(end))


def resume(url: str, timeout_s: float) -> None:
    """Sample again."""
    post_json(url, "continue_generation", {}, timeout_s)


def begin_update(url: str, timeout_s: float) -> None:
    """Open the update session that SGLang wants since 0.5.21; an older server, without the endpoint, needs none.

    A session that a trainer has left open, which died in the middle of a sync, is closed first.
    """
    try:
        _post_if_there(url, "begin_weight_update", timeout_s)
    except RolloutError as error:
        if "already open" not in str(error):
            raise
        end_update(url, timeout_s)
        _post_if_there(url, "begin_weight_update", timeout_s)


def end_update(url: str, timeout_s: float) -> None:
    """Close the update session."""
    _post_if_there(url, "end_weight_update", timeout_s)


def set_version(url: str, version: str, timeout_s: float) -> None:
    """What `meta_info.weight_version` of samples says from here on."""
    post_json(url, "update_weight_version", {"new_version": version, "abort_all_requests": False}, timeout_s)


def version(url: str, timeout_s: float) -> str | None:
    """What the server answers as now; None where it is too old to say."""
    reply = _if_there(lambda: get_json(url, "model_info", timeout_s))
    return None if reply is None else str(reply.get("weight_version"))


def weight_loaders(url: str, timeout_s: float) -> list[str]:
    """The dotted names of the loaders that the server was started with (--custom-weight-loader)."""
    return [str(name) for name in get_json(url, "server_info", timeout_s).get("custom_weight_loader") or []]  # type: ignore[attr-defined]


def flush_cache(url: str, timeout_s: float) -> None:
    """Drop the prefix cache, which belongs to the old weights; the server refuses while requests run."""
    post_json(url, "flush_cache", {}, timeout_s)


def checksums(url: str, skip: Sequence[str], timeout_s: float) -> list[dict[str, Any]]:
    """The server's own checksums of its parameters: one entry a TP rank, with `checksums` by parameter
    and `parallelism_info`, the rank's place.

    skip: parts of names to leave out.
    """
    payload: dict[str, object] = {"action": "checksum", "selector": "target", "skip_tensor_list": list(skip)}
    reply = post_json(url, "weights_checker", payload, timeout_s)
    ranks = reply.get("ranks")
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) and rank.keys() >= _OF_RANK for rank in ranks):
        raise RolloutError(f"{url}/weights_checker: no checksums in its reply: {str(reply)[:200]}")
    return ranks


def release_memory(url: str, timeout_s: float) -> None:
    """Give the GPU memory of weights and KV cache back; the server must be idle."""
    post_json(url, "release_memory_occupation", {"tags": list(MEMORY)}, timeout_s)


def resume_memory(url: str, tags: Sequence[str], timeout_s: float) -> None:
    """Take the memory of `tags` (of MEMORY) again, once; what was in it is lost."""
    post_json(url, "resume_memory_occupation", {"tags": list(tags)}, timeout_s)


def _drain(url: str, end: float) -> None:
    while (running := _running(url, _left(end))) > 0:
        if time.monotonic() > end:
            raise RolloutError(f"{url}: {running} requests still run; set weight_sync.pause to abort or retract")
        time.sleep(_POLL_S)


def _running(url: str, timeout_s: float) -> int:
    """Requests that run or wait on the server, all its data-parallel ranks."""
    loads: Any = get_json(url, "v1/loads?include=core", timeout_s).get("loads", [])
    return sum(int(load.get("num_running_reqs", 0)) + int(load.get("num_waiting_reqs", 0)) for load in loads)


def _post_if_there(url: str, endpoint: str, timeout_s: float) -> None:
    _if_there(lambda: post_json(url, endpoint, {}, timeout_s))


def _if_there(call: Callable[[], dict[str, object]]) -> dict[str, object] | None:
    """The reply; None of an older server, which does not have the endpoint."""
    try:
        return call()
    except RolloutError as error:
        if "HTTP 404" not in str(error):
            raise
        return None


def _left(end: float) -> float:
    return max(end - time.monotonic(), 0.1)
