"""One rank of several layouts in turn: a step's responses as they were sampled and padded, then balanced and packed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.balance import ReplicaShare, balance
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.experience.collate import collate
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.model.build import build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.support.layouts_in_turn import take_layout

PROMPTS, SAMPLES, VOCAB, LONGEST = 8, 2, 19, 60
LAYOUTS = {  # of four ranks: one launch for all
    "dp4": ParallelConfig(data=4),
    "tp2_sp_dp2": ParallelConfig(tensor=2, sequence=True, data=2),
    "pp2_dp2": ParallelConfig(pipeline=2, data=2),
    "cp2_dp2": ParallelConfig(context=2, data=2),
}
MODES = {"padded": 0, "packed": 64}  # train.micro_batch_tokens; the first keeps rows where they are


def responses() -> list[Rollout]:
    """Of each prompt two; prompts of even groups have the long ones, which are all on replica 0 of two."""
    chance, found = random.Random(4), []
    for group in range(PROMPTS):
        prompt = Prompt(id=group, text="", token_ids=tuple(chance.choices(range(VOCAB), k=2 + group % 3)), answer="")
        for _ in range(SAMPLES):
            length = chance.randrange(30, LONGEST - 5) if group % 2 == 0 else chance.randrange(1, 12)
            ids = tuple(chance.choices(range(VOCAB), k=length))
            logprobs = tuple(chance.uniform(-4.0, -2.0) for _ in ids)
            found.append(Rollout(prompt, group, ids, logprobs, "", "stop", (VersionSpan(0, 0, length),)))
    return found


def reward_of(rollout: Rollout) -> float:
    """Unlike that of any other response."""
    return sum(rollout.response_ids) / 7.0 + rollout.group_id


def greedy_reward_of(rollout: Rollout) -> float:
    return 0.5 * rollout.group_id


def config_of(model: str, layout: ParallelConfig, mode: str) -> Config:
    return Config(
        model=ModelConfig(path=model),
        parallel=layout,
        algorithm=algorithm_config("openrlhf_baseline", kl_coef=0.0),
        rollout=RolloutConfig(num_prompts=PROMPTS, context_length=LONGEST, max_response_tokens=LONGEST - 5),
        train=TrainConfig(batch_size=8, micro_batch_size=2, micro_batch_tokens=MODES[mode]),
        # With the usual epsilon Adam makes a step of the rate out of a gradient that is nothing but rounding.
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-5),
    )


def own_share(parallel: ParallelContext) -> ReplicaShare:
    """What this replica has sampled: prompts are dealt to replicas in turn."""
    mine = [r for r in responses() if r.group_id % parallel.dp_size == parallel.dp_rank]
    return ReplicaShare(mine, [reward_of(r) for r in mine], [greedy_reward_of(r) for r in mine])


def run_step(config: Config, parallel: ParallelContext) -> dict[str, Any]:
    """The share after the deal, and what two optimizer steps on it leave."""
    share, metrics = balance(own_share(parallel), config, read_hf_config(config.model.path), parallel)
    batch = collate(
        share.rollouts,
        share.rewards,
        share.greedy_rewards,
        minibatch_ids=share.minibatch_ids,
        pad_token_id=0,
        device=parallel.device,
    )
    policy, optimizer = make_trainable(build_model(config, parallel, path=config.model.path), config.optimizer, 10)
    batch, _, of_advantages = add_advantages(score(batch, policy, None, config), config, parallel, ShapingState())
    assert batch.advantages is not None
    stats = {**train_step(policy, optimizer, batch, config), **of_advantages}
    weights = {name: tensor.clone() for name, tensor in hf_tensors(policy)}
    rows = [row[mask > 0].tolist() for row, mask in zip(batch.advantages, batch.loss_mask, strict=True)]
    place = {"replica": parallel.dp_rank, "stage": parallel.pp_rank, "is_leader": parallel.is_replica_leader}
    return {**place, "share": share, "metrics": metrics, "advantages": rows, "stats": stats, "weights": weights}


def failures(config: Config, parallel: ParallelContext) -> dict[str, str]:
    """What every rank is told where the leader of the last replica fails, before and while responses travel."""
    is_last = parallel.dp_rank == parallel.dp_size - 1

    def without_rewards(share: ReplicaShare) -> ReplicaShare:
        return replace(share, rewards=[])

    def unpicklable(share: ReplicaShare) -> ReplicaShare:
        prompts = [replace(r.prompt, metadata={"check": lambda: None}) for r in share.rollouts]
        return replace(share, rollouts=[replace(r, prompt=p) for r, p in zip(share.rollouts, prompts, strict=True)])

    found = {}
    broken: dict[str, Callable[[ReplicaShare], ReplicaShare]]
    broken = {"without_rewards": without_rewards, "unpicklable": unpicklable}
    for name, spoil in broken.items():
        share = own_share(parallel)
        try:
            balance(spoil(share) if is_last else share, config, read_hf_config(config.model.path), parallel)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    first = None
    for name, layout in LAYOUTS.items():
        parallel = take_layout(name, layout, first)
        first = first or parallel
        for mode in MODES if layout.context == 1 else ("packed",):
            torch.save(run_step(config_of(model, layout, mode), parallel), out / f"{name}-{mode}-{parallel.rank}.pt")
    told = failures(config_of(model, LAYOUTS["cp2_dp2"], "packed"), parallel)
    (out / f"failures-{parallel.rank}.json").write_text(json.dumps(told))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
