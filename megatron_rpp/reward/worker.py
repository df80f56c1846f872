"""The process that runs verifiers on text that nobody has checked.

It is killed when one answer takes too long: a power tower such as 9^9^9^9 keeps the interpreter
inside one C call, where neither a thread nor a Python signal handler can stop it.

In (pickle, from the trainer): a `Job`. Out: "ready" once, then one line with a score for each item.
Out is text, never pickle, because what runs here is not trusted.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30
SELF_KILL_GRACE_S = 1.0  # the trainer kills first; this one serves when the trainer is gone


@dataclass(frozen=True)
class Job:
    """Answers to score. `kind` is math or reasoning_gym."""

    kind: str
    items: list[tuple[str, Any]]  # (answer, gold text) or (answer, reasoning-gym entry)
    time_limit_s: float
    task: str = ""
    task_args: dict[str, Any] = field(default_factory=dict)


def math_scorer() -> Callable[[str, str], float]:
    """1.0 where math-verify finds the answer equal to the gold text."""
    from math_verify import parse, verify

    def readings(text: str) -> list[Any]:
        boxed = parse(rf"\boxed{{{text}}}", parsing_timeout=None)
        return list(boxed) + ([] if "\\" in text else list(parse(text, parsing_timeout=None)))

    def score(answer: str, gold: str) -> float:
        # math-verify's own limits are signals in this process; the kernel's alarm is the limit here.
        return float(verify(readings(gold), readings(answer), timeout_seconds=None))

    return score


def gym_scorer(task: str, task_args: dict[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    """The task's own score, 0 to 1."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **task_args)
    return lambda answer, entry: float(dataset.score_answer(answer, entry))


def _score(scorer: Callable[[str, Any], float], answer: str, gold: Any) -> float:
    try:
        value = scorer(answer, gold)
    except Exception:  # any failure on untrusted text means: not a right answer
        return 0.0
    return min(max(value, 0.0), 1.0) if value == value else 0.0


def _serve(requests: Any, results: Any) -> None:
    scorers: dict[str, Callable[[str, Any], float]] = {}
    while True:
        try:
            job: Job = pickle.load(requests)
        except EOFError:
            return
        key = f"{job.kind}/{job.task}/{job.task_args}"
        if key not in scorers:
            scorers[key] = math_scorer() if job.kind == "math" else gym_scorer(job.task, job.task_args)
        results.write("ready\n")
        results.flush()
        for answer, gold in job.items:
            signal.setitimer(signal.ITIMER_REAL, job.time_limit_s + SELF_KILL_GRACE_S)
            score = _score(scorers[key], answer, gold)
            signal.setitimer(signal.ITIMER_REAL, 0)
            results.write(f"{score}\n")
            results.flush()


def main() -> None:
    """Serves jobs until stdin closes; what verifiers print goes nowhere."""
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        _serve(sys.stdin.buffer, results)
    except (ImportError, TypeError, AssertionError, ValueError) as error:
        results.write(f"error {type(error).__name__}: {error}".replace("\n", " ") + "\n")
        results.flush()


if __name__ == "__main__":
    main()
