"""Replies of `/generate`: whether they can be used, by which weights they were sampled, and as Rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rpp.experience.types import UNSYNCED, Prompt, Rollout, VersionSpan


def check_samples(reply: Any) -> list[dict[str, Any]]:
    """The samples of a reply. Raises ValueError where one is none, or did not end by itself."""
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
        version_spans=version_spans(meta),
        engine_prompt_ids=_prompt_ids(prompt, sample),
    )


def _prompt_ids(prompt: Prompt, sample: dict[str, Any]) -> tuple[int, ...] | None:
    """What the server took for the prompt; the prompt's own tuple where it is the same, so that no copy is kept."""
    told = sample.get("prompt_token_ids")
    if told is None:  # a server too old to know the question
        return None
    ids = tuple(told)
    return prompt.token_ids if ids == prompt.token_ids else ids


def version_spans(meta: dict[str, Any]) -> tuple[VersionSpan, ...]:
    """Which policy versions sampled a response, from its `meta_info`; servers before 0.5.21 know the last one only."""
    spans = meta.get("weight_versions")
    if spans:
        return tuple(VersionSpan(parse_version(s["version"]), int(s["start"]), int(s["end"])) for s in spans)
    return (VersionSpan(parse_version(meta.get("weight_version")), 0, len(meta["output_token_logprobs"])),)


def other_versions(samples: Sequence[dict[str, Any]], wanted: int) -> set[int]:
    """The policy versions beside `wanted` that sampled any token of `samples`."""
    return {span.version for sample in samples for span in version_spans(sample["meta_info"])} - {wanted}


def parse_version(weight_version: str | None) -> int:
    """Policy version that a sync wrote as `weight_version`; UNSYNCED for a server that never was."""
    try:
        return int(weight_version or "")
    except ValueError:
        return UNSYNCED
