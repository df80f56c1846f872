"""One gloo rank with its share of a batch: advantages of every preset, saved for comparison."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.algorithm import compute_advantages
from megatron_rpp.config.presets import PRESETS
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.collectives import sum_over

ROWS, COLUMNS, GROUPS = 24, 17, 5
SEEDS = range(3)
OVERRIDES = {"kl_coef": 0.05}


def random_batch(seed: int) -> dict[str, Tensor]:
    """Random scores; some rows without tokens, some with holes; a prompt's responses are anywhere in the batch."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(ROWS, 1, generator=g) < 0.8
    return {
        "rewards": torch.randn(ROWS, generator=g, dtype=torch.float64) + 10.0 * seed,
        "kl": torch.randn(ROWS, COLUMNS, generator=g, dtype=torch.float64),
        "loss_mask": ((torch.rand(ROWS, COLUMNS, generator=g) < 0.6) & kept).float(),
        "group_ids": torch.randint(GROUPS, (ROWS,), generator=g),
        "greedy_rewards": torch.randn(ROWS, generator=g, dtype=torch.float64),
    }


def edges(seed: int, ranks: int) -> list[int]:
    """Where an uneven split of the rows cuts. One rank gets no rows, and one gets rows without tokens."""
    g = torch.Generator().manual_seed(100 + seed)
    cuts = sorted((1 + torch.randperm(ROWS - 1, generator=g)[: ranks - 2]).tolist())
    return [0, *cuts, cuts[-1], ROWS] if seed % 2 else [0, 0, *cuts, ROWS]


def split_batch(seed: int, ranks: int) -> list[dict[str, Tensor]]:
    batch, cuts = random_batch(seed), edges(seed, ranks)
    batch["loss_mask"][cuts[-2] :] = 0
    return [{k: v[a:b] for k, v in batch.items()} for a, b in itertools.pairwise(cuts)]


def advantages(batch: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    return {name: compute_advantages(**batch, preset=name, **OVERRIDES, **settings) for name in PRESETS}


def main() -> None:
    ranks, out = (json.loads(text) for text in sys.argv[1:3])
    parallel = bootstrap.initialize(ParallelConfig(data=ranks), seed=0)
    reduce_sum = sum_over(parallel.dp_group)
    found = {seed: advantages(split_batch(seed, ranks)[parallel.rank], reduce_sum=reduce_sum) for seed in SEEDS}
    torch.save(found, Path(out) / f"rank-{parallel.rank}.pt")
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
