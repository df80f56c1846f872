"""The trainer of the weight-sync benchmark's delta part: policy-gradient steps, and a sync after one or several.

    python -m benchmarks.weight_sync_delta RESULT.json --section.key=value ...

Weights are trained in float32 with the project's own loss, optimizer and schedule, on random tokens with random
rewards, and go to one server by the delta transport. Every sync is verified: all tensors, bit for bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.weight_sync_worker import Rank, open_rank
from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config, OptimizerConfig
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.session_parts import total_optimizer_steps

DEMO = Path(__file__).parents[1] / "examples" / "demo_cpu.toml"
ROWS, WIDTH, PROMPT = 128, 16, 4  # of an optimizer step: responses, and tokens with their prompt; of a prompt


@dataclass(frozen=True)
class Series:
    """Syncs of one policy, from its start."""

    name: str
    optimizer: OptimizerConfig
    total_steps: int  # of the learning-rate schedule
    steps_per_sync: int
    syncs: int


def main() -> None:
    out, *overrides = sys.argv[1:]
    config = load_config([], overrides)
    with open_rank(config) as rank:
        found = [run_series(rank, each) for each in all_series(config.weight_sync.dtype)]
    Path(out).write_text(json.dumps(found))


def all_series(dtype: str) -> list[Series]:
    """In float32 nearly every value changes at any learning rate, so that few syncs tell enough."""
    demo = load_config([str(DEMO)], [])
    long = dtype == "bfloat16"
    steps = demo.rollout.num_prompts * demo.algorithm.num_samples_per_prompt // demo.train.batch_size
    return [
        Series("paper, one step", OptimizerConfig(), 1000, steps_per_sync=1, syncs=4 if long else 1),
        Series("paper, eight steps", OptimizerConfig(), 1000, steps_per_sync=8, syncs=2 if long else 0),
        Series("demo", demo.optimizer, total_optimizer_steps(demo), steps_per_sync=steps, syncs=6 if long else 1),
    ]


def run_series(rank: Rank, series: Series) -> dict[str, Any]:
    """A full sync, then the delta syncs: their bytes over the full one's, and the learning rate before each."""
    torch.manual_seed(0)
    config = replace(rank.config, optimizer=series.optimizer)
    policy = build_model(config, rank.parallel, path=config.model.path)
    policy, optimizer = make_trainable(policy, series.optimizer, series.total_steps)
    engine = rank.engine(policy)
    sent, rates = [], []
    for version in range(series.syncs + 1):
        if version > 0:
            for _ in range(series.steps_per_sync):
                one_step(policy, optimizer, config)
            rates.append(float(optimizer.lr))
        engine.sync(version)
        assert engine.last_sync is not None
        sent.append(engine.last_sync.sent_bytes)
    return {
        "series": series.name,
        "dtype": config.weight_sync.dtype,
        "steps_per_sync": series.steps_per_sync,
        "full_bytes": sent[0],
        "lr": rates,
        "fractions": fractions(sent),
    }


def fractions(sent: Sequence[int]) -> list[float]:
    """Bytes of each later sync over those of the first, the full one."""
    return [later / sent[0] for later in sent[1:]]


def one_step(policy: Model, optimizer: Optimizer, config: Config) -> None:
    """One optimizer step of REINFORCE++ on random tokens."""
    batch = score(random_batch(policy.hf.vocab_size), policy, None, config)
    batch, _, _ = add_advantages(batch, config, policy.parallel, ShapingState())
    train_step(policy, optimizer, batch, config)


def random_batch(vocab_size: int) -> ExperienceBatch:
    """ROWS responses of WIDTH - PROMPT random tokens, with random rewards."""
    mask = torch.zeros(ROWS, WIDTH)
    mask[:, PROMPT:] = 1
    return ExperienceBatch(
        tokens=torch.randint(vocab_size, (ROWS, WIDTH)),
        loss_mask=mask,
        rollout_logprobs=torch.zeros(ROWS, WIDTH),
        rewards=torch.rand(ROWS, dtype=torch.float64),
        group_ids=torch.arange(ROWS) // 4,
    )


if __name__ == "__main__":
    main()
