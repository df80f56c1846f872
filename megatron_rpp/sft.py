"""`rpp sft`: a supervised warm start on demonstrations, with the same engine and configuration."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from megatron_rpp.config.allocator import check_allocator
from megatron_rpp.config.schema import Config, OptimizerConfig
from megatron_rpp.data.prompts import load_demonstrations
from megatron_rpp.data.tokenizer import tokenizer_of
from megatron_rpp.engine.heads import SftHead
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.overlap import finish_param_gather
from megatron_rpp.engine.score import logprob_head, uses_fused_logprobs
from megatron_rpp.engine.train_step import global_counts, optimizer_step
from megatron_rpp.experience.collate import pad_rows
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import build_model
from megatron_rpp.model.fp8 import check_can_compute
from megatron_rpp.model.layer_spec import agreed_layer_spec
from megatron_rpp.model.save_hf import save_hf
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.own_failure import training_begins
from megatron_rpp.parallel.watchdog import Watchdog

logger = logging.getLogger(__name__)
Demonstration = tuple[list[int], list[int]]  # (prompt ids, response ids with the end token)
REPORT_EVERY = 50


def run(config: Config) -> int:
    """Train sft.init on sft.data and write sft.output. Every rank calls it. Returns the exit code, 0."""
    parallel = bootstrap.initialize(
        config.parallel, config.run.seed, run_dir=config.run.dir, graph_generators=config.train.cuda_graphs
    )
    watchdog = Watchdog(parallel.store, parallel.place, config.run.dir, config.watchdog)
    with watchdog, ExitStack() as stack, watchdog.telling():
        stack.callback(bootstrap.shutdown)
        _train(config, parallel, watchdog)
    return 0


def _train(config: Config, parallel: ParallelContext, watchdog: Watchdog) -> None:
    sft = config.sft
    check_allocator(config, os.environ, syncs=False)
    check_can_compute(config, agreed_layer_spec(config.model.layer_spec))
    uses_fused_logprobs(config.train.fused_logprobs)  # or it cannot be
    tokenizer = tokenizer_of(config, sft.init)
    demonstrations = load_demonstrations(sft.data, tokenizer, config.data, max_tokens=config.rollout.context_length)
    model, optimizer = make_trainable(
        build_model(config, parallel, path=sft.init), _optimizer_config(config), sft.steps
    )
    order = random.Random(config.run.seed)
    started = time.monotonic()
    training_begins()
    for step in range(sft.steps):
        drawn = [order.choice(demonstrations) for _ in range(sft.batch_size)]
        mine = drawn[parallel.dp_rank :: parallel.dp_size]
        batch = to_batch(mine, tokenizer.pad_token_id, parallel.device)
        count, _ = global_counts(batch, model)
        head = SftHead(logprob_head(model, config, temperature=1.0), count)
        with watchdog.phase("train"):
            sums, norm = optimizer_step(model, optimizer, batch, head, config.train)
        if parallel.rank == 0 and ((step + 1) % REPORT_EVERY == 0 or step + 1 == sft.steps):
            seconds = time.monotonic() - started
            sys.stdout.write(
                f"sft {step + 1}/{sft.steps}  loss {sums['loss/total'] / count:.4f}  "
                f"grad norm {norm:.3f}  lr {optimizer.lr:.2e}  {seconds:.0f} s\n"
            )
            sys.stdout.flush()
    finish_param_gather(model)
    save_hf(model, sft.init, sft.output, mtp=config.model.mtp)
    logger.info("wrote %s", sft.output)


def _optimizer_config(config: Config) -> OptimizerConfig:
    sft = config.sft
    return replace(
        config.optimizer,
        lr=sft.lr,
        min_lr=sft.min_lr,
        lr_schedule=sft.lr_schedule,
        warmup_steps=sft.warmup_steps,
    )


def to_batch(demonstrations: Sequence[Demonstration], pad: int, device: torch.device) -> ExperienceBatch:
    """One row a demonstration; rewards and groups are of no use here."""
    tokens, loss_mask = pad_rows(demonstrations, pad)
    zeros = torch.zeros(len(demonstrations))
    return ExperienceBatch(
        tokens=tokens.to(device),
        loss_mask=loss_mask.to(device),
        rollout_logprobs=torch.zeros_like(loss_mask, device=device),
        rewards=zeros.to(device),
        group_ids=zeros.to(device, torch.int64),
    )
