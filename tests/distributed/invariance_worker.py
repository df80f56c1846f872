"""One rank of one layout: advantages, loss and gradients of the fixed batch, saved for comparison."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.config.presets import PRESETS, algorithm_config
from megatron_rpp.config.schema import AlgorithmConfig, Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.heads import ALL_POSITIONS, REAL_POSITIONS, PolicyHead
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logits_head, logprob_head, score
from megatron_rpp.engine.train_step import global_counts
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.model.save_hf import save_hf
from megatron_rpp.model.shards import ShardedParameter
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.collectives import max_over, sum_over
from megatron_rpp.parallel.context import ParallelContext
from tests.distributed.layouts import PACKED_TOKENS, worker_config

ROWS, WIDTH, VOCAB = 8, 13, 19
ON_PACKED = ("paper", "every_option")


def fixed_batch() -> ExperienceBatch:
    """Eight rows of different lengths, one without any response token, with fixed old and reference log-probs.

    The log-probs lie near those of the tiny models, so that some ratios are clipped and some are not.
    """
    g = torch.Generator().manual_seed(3)
    mask = torch.zeros(ROWS, WIDTH)
    for row, (start, end) in enumerate([(2, 9), (5, 6), (1, 13), (4, 4), (3, 12), (6, 11), (2, 4), (7, 13)]):
        mask[row, start:end] = 1
    return ExperienceBatch(
        tokens=torch.randint(VOCAB, (ROWS, WIDTH), generator=g),
        loss_mask=mask,
        rollout_logprobs=(torch.randn(ROWS, WIDTH, generator=g) * 0.3 - 3.0) * mask,
        rewards=torch.rand(ROWS, generator=g) * 3 - 1,
        greedy_rewards=torch.rand(ROWS // 2, generator=g).repeat_interleave(2),
        group_ids=torch.arange(ROWS) // 2,  # with two replicas each group is on both
        old_logprobs=(torch.randn(ROWS, WIDTH, generator=g) * 0.3 - 3.0) * mask,
        ref_logprobs=(torch.randn(ROWS, WIDTH, generator=g) * 0.3 - 3.0) * mask,
    )


def own_rows(parallel: ParallelContext) -> ExperienceBatch:
    """This replica's rows of the fixed batch, as wide as the longest of them, as `collate` leaves them."""
    batch = fixed_batch().rows(torch.arange(parallel.dp_rank, ROWS, parallel.dp_size))
    width = int(batch.loss_mask.nonzero()[:, 1].max()) + 1
    return ExperienceBatch(**{k: x[:, :width] if x.dim() == 2 else x for k, x in batch.tensors().items()})


def algorithms() -> dict[str, AlgorithmConfig]:
    """Every preset, with a KL in the reward where it has a place for one; and every loss option at once."""
    found = {}
    for name in PRESETS:
        preset = algorithm_config(name)
        found[name] = preset if preset.kl_placement == "none" else replace(preset, kl_coef=0.05)
    found["every_option"] = algorithm_config(
        "openrlhf_baseline", dual_clip=1.5, loss_aggregation="sequence_mean", kl_loss_coef=0.1, kl_loss_estimator="k3",
        entropy_coef=0.05, importance_correction="sequence_masked", importance_high=1.2,
    )  # fmt: skip
    return found


def algorithms_of(family: str, is_packed: bool) -> dict[str, AlgorithmConfig]:
    """Those that a family is trained with: all on Llama. Losses see rows, packed or not, so there two will do."""
    if family != "llama":
        return {"paper": AlgorithmConfig()}
    return {name: algorithm for name, algorithm in algorithms().items() if not is_packed or name in ON_PACKED}


def run_case(config: Config, parallel: ParallelContext, out: Path, family: str) -> None:
    """Scores once; then advantages, loss and gradients of each algorithm."""
    model = build_model(config, parallel, path=config.model.path)
    round_trip = {name: x.clone() for name, x in hf_tensors(model)}
    policy, _ = make_trainable(model, config.optimizer, 1)
    reference = build_model(config, parallel, path=config.model.path)
    shift_weights(reference)
    force_full_gradients(policy)
    batch = own_rows(parallel)
    scored = score(batch, policy, reference, config)
    logprobs = {"policy_logprobs": scored.old_logprobs, "ref_logprobs": scored.ref_logprobs}
    assert_equal_on(parallel.cp_group, scored)
    with torch.no_grad():
        found = run_pipeline(policy, batch, logits_head(policy), train=config.train, forward_only=True)
    if parallel.is_replica_leader:
        logits = F.pad(found["logits"][:, :WIDTH], (0, 0, 0, max(0, WIDTH - found["logits"].shape[1])))
        torch.save(logits, out / f"{family}-logits-replica{parallel.dp_rank}.pt")
    for name, algorithm in algorithms_of(family, config.train.micro_batch_tokens > 0).items():
        result, gradients = train_once(replace(config, algorithm=algorithm), parallel, policy, batch)
        if parallel.dp_size > 1 and config.train.micro_batch_tokens and name == "paper":
            assert_replicas_may_have_no_rows(replace(config, algorithm=algorithm), parallel, policy, gradients)
        if parallel.is_replica_leader:
            rows = {k: F.pad(x, (0, WIDTH - x.shape[1])) for k, x in {**result.pop("rows"), **logprobs}.items()}
            torch.save({**result, **rows}, out / f"{family}-{name}-replica{parallel.dp_rank}.pt")
        if parallel.is_stage_leader:
            torch.save(gradients, out / f"{family}-{name}-stage{parallel.pp_rank}.pt")
    if parallel.is_stage_leader:
        torch.save(round_trip, out / f"{family}-weights-stage{parallel.pp_rank}.pt")
    if reference.hf.moe is not None and not config.train.micro_batch_tokens:
        save_hf(policy, config.model.path, str(out / f"{family}-saved"))


def train_once(
    config: Config, parallel: ParallelContext, policy: Model, batch: ExperienceBatch
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(loss, advantages and metrics, gradients of this stage by Hugging Face name)."""
    batch, _, _ = add_advantages(batch, config, parallel, ShapingState())
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    algorithm = replace(config.algorithm, loss_constant=WIDTH)
    head = PolicyHead(logprob_head(policy, config, 1.0), algorithm, *global_counts(batch, policy))
    sums = run_pipeline(policy, batch, head, train=config.train, forward_only=False)
    sums = {name: sum_over(parallel.dp_group)(x) / head.global_token_count for name, x in sums.items()}
    positions = {name: sums.pop(name) * head.global_token_count for name in (REAL_POSITIONS, ALL_POSITIONS)}
    gradients = {name: x.clone() for name, x in hf_tensors(policy, _gradient)}
    return {"rows": {"advantages": batch.advantages}, "sums": sums, "positions": positions}, gradients


def _gradient(item: ShardedParameter) -> Tensor | None:
    """None for a buffer."""
    return getattr(item.parameter, "main_grad", None)


def assert_replicas_may_have_no_rows(
    config: Config, parallel: ParallelContext, policy: Model, expected: dict[str, Tensor]
) -> None:
    """The gradients are the `expected` ones where the first replica has every row."""
    batch = fixed_batch().rows(torch.arange(ROWS if parallel.dp_rank == 0 else 0))
    _, found = train_once(config, parallel, policy, batch)
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
    assert all(error < 1e-5 for error in errors.values()), errors


def assert_equal_on(group: ProcessGroup, batch: ExperienceBatch) -> None:
    """The CP ranks of a replica have all log-probs, each the same."""
    for x in (batch.old_logprobs, batch.ref_logprobs, batch.entropy):
        assert x is not None and torch.equal(max_over(group)(x), -max_over(group)(-x))


def shift_weights(model: Model) -> None:
    """Make the reference differ from the policy by the same amount on every layout."""
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.05)


def force_full_gradients(policy: Model) -> None:
    """All-reduce rather than reduce-scatter, so that each rank holds its whole gradient for comparison."""
    finalize = policy.config.finalize_model_grads_func

    def all_reduced(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize(model, num_tokens, **{**kwargs, "force_all_reduce": True})

    policy.config.finalize_model_grads_func = all_reduced


def main() -> None:
    arguments = json.loads(sys.argv[2])
    parallel = None
    for kind, tokens in {"padded": 0, "packed": PACKED_TOKENS}.items():
        for name, path in arguments[kind].items():
            config, _ = worker_config(path, tokens)
            parallel = parallel or bootstrap.initialize(config.parallel, seed=0)
            run_case(config, parallel, Path(arguments["out"], kind), name)
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
