"""RUN_DIR/rollouts: step-N.jsonl, what was sampled, in words; step-N.skipped.jsonl, what was left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_rpp.observability.files import write_whole


class PromptLike(Protocol):
    """`experience.types.Prompt`, which is a layer above this one."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def source(self) -> str: ...


class RolloutLike(Protocol):
    """`experience.types.Rollout`."""

    @property
    def prompt(self) -> PromptLike: ...
    @property
    def group_id(self) -> int: ...
    @property
    def response_ids(self) -> tuple[int, ...]: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def policy_version(self) -> int: ...
    @property
    def version_spans(self) -> Sequence[tuple[int, int, int]]: ...  # (version, start, end) in response tokens


class Skipped(NamedTuple):
    """A prompt that dynamic sampling has used up without training on it."""

    prompt_id: int
    group_id: int
    reward: float  # that each response to it earned


def rollouts_path(run_dir: str | Path, step: int, replica: int = 0) -> Path:
    """The file of one step; data-parallel replicas above the first have their own."""
    name = f"step-{step}.jsonl" if replica == 0 else f"step-{step}.replica-{replica}.jsonl"
    return Path(run_dir) / "rollouts" / name


def write_rollouts(
    run_dir: str | Path,
    step: int,
    rollouts: Sequence[RolloutLike],
    rewards: Sequence[float],
    *,
    replica: int = 0,
) -> Path:
    """Write one object a response; a step that is run again replaces its file whole."""
    path = rollouts_path(run_dir, step, replica)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (_record(rollout, float(reward)) for rollout, reward in zip(rollouts, rewards, strict=True))
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def skipped_path(run_dir: str | Path, step: int) -> Path:
    """The file of one step, for all replicas."""
    return Path(run_dir) / "rollouts" / f"step-{step}.skipped.jsonl"


def write_skipped(run_dir: str | Path, step: int, skipped: Sequence[Skipped]) -> None:
    """Write one object a prompt; where there is none, there is no file."""
    path = skipped_path(run_dir, step)
    path.unlink(missing_ok=True)  # of this step, before it was run again
    if skipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(each._asdict()) + "\n" for each in skipped))


def _record(rollout: RolloutLike, reward: float) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "source": rollout.prompt.source,
        "group_id": rollout.group_id,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "response_tokens": len(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "version_spans": rollout.version_spans,
        "reward": reward,
    }
