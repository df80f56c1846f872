"""What became of each prompt, from the files of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.observability.rollouts import rollouts_path, skipped_path


def used(run_dir: Path, step: int, samples: int, replicas: int = 1) -> tuple[list[int], list[int]]:
    """(prompts that a step has trained on, prompts that it left out), of all replicas."""
    records = [record for replica in range(replicas) for record in _lines(rollouts_path(run_dir, step, replica))]
    groups = Counter((record["group_id"], record["prompt_id"]) for record in records)
    assert set(groups.values()) <= {samples}, "a group is whole, and sampled once"
    return [prompt for _, prompt in groups], [record["prompt_id"] for record in _lines(skipped_path(run_dir, step))]


def check_used_once_an_epoch(found: Counter[int], fresh: PromptSource, state: Mapping[str, Any]) -> None:
    """found: how often each prompt was used. fresh: the run's source at its start. state: of the source at the end.

    The positions of the order that are below `served` were used once each, but for those that wait for their turn.
    """
    waiting = {position for position, _ in state["deferred"]}
    served = fresh.peek(state["served"])
    assert found == Counter(draw.prompt.id for draw in served if draw.position not in waiting)
    assert max(found.values()) - min(found.values()) <= 2, "a prompt that was put off is never far behind"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()] if path.exists() else []
