"""Training steps on the recorded lengths, packed and padded in turns: one rank of real Megatron-Core on CPU.

    python -m benchmarks.long_cot_train RESULT.json LENGTHS.json REPEATS --section.key=value ...

LENGTHS.json: tokens of prompt and response of each row, beside the prompt's. Started by benchmarks/long_cot.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.parallel import bootstrap

MODES = ("packed", "padded_to_batch", "padded_to_maximum")


@dataclass
class Counter:
    """Positions that the model has run over, padding included."""

    positions: int = 0

    def watch(self, model: Model) -> None:
        """From here on. The first chunk is given the tokens, [b, S] or packed [1, T]."""
        model.chunks[0].register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        self.positions += given[0].numel()


def main() -> None:
    out, given, repeats, *overrides = sys.argv[1:]
    config = load_config([], overrides)
    setup_logging(config.run.dir, int(os.environ["RANK"]))
    lengths = json.loads(Path(given).read_text())
    parallel = bootstrap.initialize(config.parallel, config.run.seed, 600.0)
    with ExitStack() as stack:
        stack.callback(bootstrap.shutdown)
        policy = build_model(config, parallel, path=config.model.path)
        policy, optimizer = make_trainable(policy, config.optimizer, 1_000_000)
        batch = random_batch(lengths["rows"], lengths["prompt"], policy.hf.vocab_size, config)
        Path(out).write_text(json.dumps(compare(policy, optimizer, batch, config, int(repeats))))


def compare(
    policy: Model, optimizer: Optimizer, batch: ExperienceBatch, config: Config, repeats: int
) -> dict[str, dict[str, Any]]:
    """Of each mode: seconds of the steps (one a repeat, the first of all not counted), positions and statistics."""
    kinds = ("seconds", "score_seconds", "cpu_seconds")
    counter = Counter()
    found: dict[str, dict[str, Any]] = {mode: {kind: [] for kind in kinds} for mode in MODES}
    counter.watch(policy)
    for repeat in range(repeats + 1):
        for mode in MODES:
            given, settings = prepared(batch, config, mode)
            counter.positions, started, cpu_started = 0, time.perf_counter(), time.process_time()
            scored = score(given, policy, None, settings)
            scored_at = time.perf_counter()
            scored, _, _ = add_advantages(scored, settings, policy.parallel, ShapingState())
            stats = train_step(policy, optimizer, scored, settings)
            ended = time.perf_counter()
            of_mode = found[mode]
            of_mode |= {"positions": counter.positions // 2, "grad_norm": stats["grad_norm"]}  # scored, then trained
            if repeat > 0:
                of_mode["seconds"].append(ended - started)
                of_mode["score_seconds"].append(scored_at - started)
                of_mode["cpu_seconds"].append(time.process_time() - cpu_started)
    return found


def prepared(batch: ExperienceBatch, config: Config, mode: str) -> tuple[ExperienceBatch, Config]:
    """(the batch as a trainer of this kind has it, its settings)."""
    if mode == "packed":
        return batch, config
    settings = replace(config, train=replace(config.train, micro_batch_tokens=0))
    if mode == "padded_to_batch":
        return batch, settings
    columns = config.rollout.context_length - batch.tokens.shape[1]
    wide = {name: F.pad(x, (0, columns)) if x.dim() == 2 else x for name, x in batch.tensors().items()}
    return ExperienceBatch(**wide), settings


def random_batch(rows: Sequence[int], prompt: int, vocab_size: int, config: Config) -> ExperienceBatch:
    """Rows of so many random tokens, `prompt` of them the prompt's, with random rewards, as `collate` makes them."""
    torch.manual_seed(0)
    count, steps = len(rows), max(1, len(rows) // config.train.batch_size)
    columns = torch.arange(max(rows))
    lengths = torch.tensor(rows)[:, None]
    is_token = columns < lengths
    return ExperienceBatch(
        tokens=torch.randint(vocab_size, (count, max(rows))) * is_token,
        loss_mask=(is_token & (columns >= prompt)).float(),
        rollout_logprobs=torch.zeros(count, max(rows)),
        rewards=torch.rand(count, dtype=torch.float64),
        group_ids=torch.arange(count) // config.algorithm.num_samples_per_prompt,
        minibatch_ids=torch.arange(count) * steps // count,
    )


if __name__ == "__main__":
    main()
