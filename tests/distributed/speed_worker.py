"""One rank of several layouts in turn: two optimizer steps plain, and again with an option of speed or memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import Config
from megatron_rpp.engine import optimizer as optimizer_module
from megatron_rpp.engine.heads import PolicyHead
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.overlap import finish_param_gather
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.engine.train_step import global_counts, optimizer_step
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.distributed.plan_worker import LiveSaved
from tests.support.layouts_in_turn import take_layout

STEPS, ROWS, LENGTH = 2, 4, 12
BF16_STEPS = 8


def train(config: Config, parallel: ParallelContext) -> dict[str, Any]:
    """What moved, gradient norms, peak of saved activations and how communication went: this rank, STEPS updates."""
    policy, optimizer = make_trainable(build_model(config, parallel, path=config.model.path), config.optimizer, STEPS)
    started = weights(policy)
    live, norms = LiveSaved({p.untyped_storage().data_ptr() for c in policy.chunks for p in c.parameters()}), []
    for step in range(STEPS):
        batch = random_batch(policy, seed=step * parallel.dp_size + parallel.dp_rank)
        head = PolicyHead(logprob_head(policy, config, 1.0), config.algorithm, *global_counts(batch, policy))
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
            norms.append(optimizer_step(policy, optimizer, batch, head, config.train)[1])
    before = weights(policy)
    finish_param_gather(policy)
    ddp: list[Any] = policy.chunks
    groups = [group for chunk in ddp for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    moved = {name: weight - started[name] for name, weight in weights(policy).items()}
    late = any(not torch.equal(weight, before[name]) for name, weight in weights(policy).items())
    buckets = sum(len(group.buckets) for group in groups)
    return {"moved": moved, "norms": norms, "saved": live.peak, "buckets": buckets, "gathered_late": late}


def weights(model: Model) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.detach().float().clone()
        for index, chunk in enumerate(model.chunks)
        for name, parameter in chunk.named_parameters()
    }


def random_batch(policy: Model, seed: int) -> ExperienceBatch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, LENGTH)
    mask[:, :3] = 0
    mask[1, 8:] = 0
    return ExperienceBatch(
        tokens=torch.randint(policy.hf.vocab_size, (ROWS, LENGTH), generator=g),
        loss_mask=mask,
        rollout_logprobs=-mask,
        rewards=torch.zeros(ROWS, dtype=torch.float64),
        greedy_rewards=None,
        group_ids=torch.arange(ROWS),
        old_logprobs=-3.0 * mask,
        advantages=torch.randn(ROWS, LENGTH, generator=g) * mask,
    )


def compare(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far weights moved otherwise, as a part of how far they moved; the same of gradient norms."""
    errors = {n: float((other["moved"][n] - x).norm() / x.norm()) for n, x in plain["moved"].items() if x.norm() > 0}
    still = [name for name, x in plain["moved"].items() if x.norm() == 0]
    assert all(other["moved"][name].norm() == 0 for name in still)
    norms = max(abs(a - b) / a for a, b in zip(plain["norms"], other["norms"], strict=True))
    return {
        "weights": max(errors.values()),
        "norms": norms,
        "saved": other["saved"] / max(plain["saved"], 1),
        "still": still,
        "buckets": other["buckets"],
        "gathered_late": other["gathered_late"],
    }


def small_updates_in_bfloat16(config: Config, parallel: ParallelContext) -> list[float]:
    """The share of weights between 0.5 and 2 that have moved after each of some steps of 0.001."""
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    config = replace(config, optimizer=replace(config.optimizer, lr=1e-3, adam_eps=1e-8))
    policy, optimizer = make_trainable(build_model(config, parallel, path=config.model.path), config.optimizer, 99)
    started = torch.cat([x.flatten() for x in weights(policy).values()])
    batch, moved = random_batch(policy, seed=parallel.dp_rank), []
    for _ in range(BF16_STEPS):
        head = PolicyHead(logprob_head(policy, config, 1.0), config.algorithm, *global_counts(batch, policy))
        optimizer_step(policy, optimizer, batch, head, config.train)
        now = torch.cat([x.flatten() for x in weights(policy).values()])
        watched = (started.abs() > 0.5) & (started.abs() < 2)
        moved.append(float((now != started)[watched].float().mean()))
    assert all(p.main_grad.dtype == torch.float32 for c in policy.chunks for p in c.parameters())  # type: ignore[attr-defined]
    return moved


def main() -> None:
    cases: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    out, first = Path(sys.argv[2]), None
    # Of a few hundred parameters, so that these models have several buckets.
    optimizer_module.DistributedDataParallelConfig = partial(  # type: ignore[attr-defined]
        DistributedDataParallelConfig, bucket_size=3000
    )
    for case, job in cases.items():
        config = build(job["settings"])
        parallel = take_layout(case, config.parallel, first)
        first = first or parallel
        plain, found = train(config, parallel), {}
        for name, changes in job["variants"].items():
            changed = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
            found[name] = compare(plain, train(build({**job["settings"], **changed}), parallel))
        if job.get("bfloat16"):
            found["bfloat16"] = {"moved": small_updates_in_bfloat16(config, parallel)}
        (out / f"{case}-{parallel.rank}.json").write_text(json.dumps(found))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
