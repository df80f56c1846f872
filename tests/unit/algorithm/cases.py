"""Random batches for the tests of the objective, and ranks to spread them over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import ReduceSum
from megatron_rpp.config.presets import PRESETS

PRESET_NAMES = tuple(PRESETS)
Batch = dict[str, Any]  # of tensors; Any, so that ** passes mypy
Result = TypeVar("Result")


def random_mask(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """[rows, columns]: by chance a row has no token, one token, a run of them, or a run with holes."""
    mask = torch.zeros(rows, columns)
    for row in mask:
        kind, first = int(torch.randint(4, (), generator=g)), int(torch.randint(columns, (), generator=g))
        if kind == 1:
            row[first] = 1
        elif kind > 1:
            row[first // 2 :] = 1
            if kind == 3:
                row *= torch.rand(columns, generator=g) < 0.6
    return mask


def random_batch(seed: int, rows: int = 9, columns: int = 6, groups: int = 4, pairs: bool = False) -> Batch:
    """What `compute_advantages` takes, float64. Groups are interleaved; with `pairs` none has a single row."""
    g = torch.Generator().manual_seed(seed)
    group_ids = torch.randint(groups, (rows,), generator=g)
    if pairs:
        group_ids = torch.cat([torch.arange(rows // 2), torch.arange(rows - rows // 2) % (rows // 2)])
    return {
        "rewards": torch.randn(rows, generator=g, dtype=torch.float64),
        "kl": torch.randn(rows, columns, generator=g, dtype=torch.float64),
        "loss_mask": random_mask(g, rows, columns),
        "group_ids": group_ids,
        "greedy_rewards": torch.randn(groups if not pairs else rows, generator=g, dtype=torch.float64)[group_ids],
    }


def random_loss_case(seed: int, rows: int = 6, columns: int = 7, spread: float = 0.4) -> Batch:
    """What `policy_loss` takes, float64; `spread` is the deviation of log pi - log pi_old."""
    g = torch.Generator().manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(rows, columns, generator=g, dtype=torch.float64)

    old = randn() - 3
    mask = random_mask(g, rows, columns)
    mask[0] = 1
    return {
        "policy_logprobs": old + spread * randn(),
        "old_logprobs": old,
        "advantages": randn(),
        "loss_mask": mask,
        "rollout_logprobs": old + 0.5 * randn(),
        "ref_logprobs": old + 0.5 * randn(),
        "entropy": randn().abs(),
    }


class Ranks:
    """`size` threads that all-reduce with one another. Shapes and dtypes of the calls are in `calls`, by rank."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.inbox: list[Tensor | None] = [None] * size
        self.calls: list[list[tuple[tuple[int, ...], torch.dtype]]] = [[] for _ in range(size)]

    def reduce_sum(self, rank: int, x: Tensor) -> Tensor:
        self.calls[rank].append((tuple(x.shape), x.dtype))
        self.inbox[rank] = x
        self.barrier.wait()
        total = torch.stack(self.inbox).sum(0)  # type: ignore[arg-type]
        self.barrier.wait()
        return total

    def run(self, work: Callable[[int, ReduceSum], Result]) -> list[Result]:
        """work(rank, reduce_sum) on every rank at once; a hang is a BrokenBarrierError."""

        def one(rank: int) -> Result:
            return work(rank, lambda x: self.reduce_sum(rank, x))

        with ThreadPoolExecutor(len(self.inbox)) as pool:
            return list(pool.map(one, range(len(self.inbox))))


def one_rank(x: Tensor) -> Tensor:
    return x
