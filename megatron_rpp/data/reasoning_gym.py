"""Problems from reasoning-gym's generators. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from random import Random
from typing import Any

from megatron_rpp.config.data import SourceConfig

_SIZE = 25_000  # the paper's number of samples


def gym_problems(source: SourceConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(template fields, whole entry) of each problem.

    Fields are the entry's metadata keys, then `question`, `prompt` (the same text) and `answer`.

    Raises:
        ValueError: the package is missing; the task or one of its arguments is unknown or out of range.
    """
    dataset = open_task(source)
    for index in range(len(dataset)):
        entry: dict[str, Any] = dataset[index]
        question, answer = entry["question"], entry["answer"]
        text = "" if answer is None else str(answer)  # some tasks have many right answers and name none
        yield {**entry["metadata"], "question": question, "prompt": question, "answer": text}, entry


def open_task(source: SourceConfig) -> Any:
    """The reasoning-gym dataset of a source."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"kind = reasoning_gym needs the package: pip install reasoning-gym ({error})") from error
    if source.task not in DATASETS:
        near = get_close_matches(source.task, DATASETS, n=1, cutoff=0.0)
        raise ValueError(f"reasoning_gym has no task {source.task!r}; did you mean {near[0]!r}?")
    if {"seed", "size"} & source.task_args.keys():
        raise ValueError(f"{source.task}: set `size` and `seed` of the source, not in task_args")
    # reasoning-gym seeds problem i with seed + i: seeds 0 and 1 would share all problems but one.
    seed = Random(source.seed).randrange(2**31)
    try:
        return reasoning_gym.create_dataset(source.task, size=_size(source), seed=seed, **source.task_args)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"reasoning_gym task {source.task}: task_args={source.task_args} with size={_size(source)}: {error}"
        ) from error


def _size(source: SourceConfig) -> int:
    """How many problems are generated."""
    return source.size or _SIZE
