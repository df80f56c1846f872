"""Megatron's DDP wrapper, optimizer and learning-rate schedule for the policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rpp.config import schema
from megatron_rpp.engine.loss_scale import use_plain_gradient_sum
from megatron_rpp.engine.overlap import overlap_gradient_sums
from megatron_rpp.model.build import Model
from megatron_rpp.model.shards import sharded_parameters


@dataclass(frozen=True)
class Optimizer:
    """The policy's optimizer and its schedule, stepped together."""

    megatron: MegatronOptimizer
    schedule: OptimizerParamScheduler

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.megatron.param_groups[0]["lr"])


def chained_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that Megatron steps as one: a second one where the model has experts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def make_trainable(model: Model, config: schema.OptimizerConfig, total_steps: int) -> tuple[Model, Optimizer]:
    """Wrap `model` for training: (the model with DDP chunks, its optimizer). `total_steps`: optimizer steps."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        fp8_param_gather=bool(model.config.fp8_param),
    )
    _reduce_experts_apart(model)
    chunks = [
        # Of interleaved chunks the first alone is summed in parts: the others' backward is followed by more work.
        DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    for chunk in chunks:
        if not model.config.fp8_param:  # every rank has read the same weights, and NCCL knows no FP8 tensors
            chunk.broadcast_params()
    use_plain_gradient_sum(model.config)
    if config.overlap_grad_reduce:
        overlap_gradient_sums(model.config, chunks)
    megatron = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            fp8_recipe=model.config.fp8_recipe if model.config.fp8_param else None,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=config.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    return replace(model, chunks=list(chunks)), Optimizer(megatron, _schedule(megatron, config, total_steps))


def _reduce_experts_apart(model: Model) -> None:
    """Have DDP sum every expert's gradient over the ranks that hold the same expert.

    Megatron marks experts so (`allreduce`) only under expert parallelism. With EP 1, TP above 1 and ETP 1 each
    TP rank runs its own tokens through whole experts, and their gradients would not be summed over TP.
    """
    for item in sharded_parameters(model.chunks):
        if item.is_expert:
            item.parameter.allreduce = False  # type: ignore[attr-defined]


def _schedule(
    optimizer: MegatronOptimizer, config: schema.OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # A resumed run follows its own configuration; only the step count comes from the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
