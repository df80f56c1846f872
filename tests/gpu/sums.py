"""The demo's task on a demo model whose dimensions suit FP8: sums of two numbers, from examples/make_demo.py."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from examples.make_demo import make_demonstrations, problem, split_sums, write_jsonl, write_model, write_tokenizer
from megatron_rpp.config.data import DataConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompts import load_demonstrations
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.engine.heads import SftHead
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.engine.train_step import global_counts, optimizer_step
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.sft import Demonstration, to_batch
from tests.gpu.site import VOCAB, Site

SHAPE = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab_size": VOCAB}
SMALL = {**SHAPE, "hidden": 32, "layers": 2, "ffn": 64}


def write_start(site: Site) -> tuple[Path, list[Demonstration]]:
    """(the model's directory, right sums as token ids)."""
    out = site.folder / "demo"
    if not out.exists():
        out.mkdir()
        write_tokenizer(out)
        write_model(out, argparse.Namespace(seed=0, **(SMALL if site.is_tiny else SHAPE)))
        rng = random.Random(0)
        sums, _ = split_sums(rng, 512)
        write_jsonl(out / "problems.jsonl", map(problem, sums))
        write_jsonl(out / "sums.jsonl", make_demonstrations(rng, sums, 200 if site.is_tiny else 20_000, 0.0))
    tokenizer = load_tokenizer(str(out), trust_remote_code=False)
    data = DataConfig(prompt_template="{expression}=")
    return out, load_demonstrations(str(out / "sums.jsonl"), tokenizer, data, max_tokens=16)


def train(
    site: Site, config: Config, sums: Sequence[Demonstration], *, steps: int, seed: int
) -> tuple[Model, Optimizer, list[float]]:
    """(policy, optimizer, loss of each step) from the directory of `config`; the seed orders the sums."""
    built = build_model(config, site.parallel, path=config.model.path)
    policy, optimizer = make_trainable(built, config.optimizer, steps)
    return policy, optimizer, train_on(config, policy, optimizer, sums, steps=steps, seed=seed)


def train_on(
    config: Config, policy: Model, optimizer: Optimizer, sums: Sequence[Demonstration], *, steps: int, seed: int = 0
) -> list[float]:
    """The loss of each step."""
    order, losses = random.Random(seed), []
    for _ in range(steps):
        batch = to_batch(order.choices(sums, k=config.train.batch_size), 0, policy.parallel.device)
        count, _ = global_counts(batch, policy)
        head = SftHead(logprob_head(policy, config, temperature=1.0), count)
        totals, _ = optimizer_step(policy, optimizer, batch, head, config.train)
        losses.append(totals["loss/total"] / count)
    return losses
