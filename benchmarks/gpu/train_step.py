"""Model FLOP utilization (MFU) of optimizer steps on packed tokens: bfloat16, and each FP8 recipe of the GPU.

    python -m benchmarks.gpu.train_step [--tiny] [--models llama-1b,qwen3-4b] [--tokens 8192,32768] [--repeats 3]

A step is forward, backward and update of MICROBATCHES packed microbatches, of sequences of --length tokens, with the
policy loss on every token. Its FLOPs are three times those that model/cost.py counts for a forward: matrix products,
causal attention at half of the square. What is recomputed (memory.recompute=full, where RECOMPUTED says so) is work
but no model FLOP, and is not counted: MFU is then at most 3/4. `mfu` is against the maker's bfloat16 figure, for FP8
too; `of_matmul` against a plain bfloat16 matrix product of the model's sizes, measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import parameter_count, random_model, shape
from benchmarks.gpu.timing import measure, peak_flops, recipes
from megatron_rpp import device
from megatron_rpp.config.performance import Fp8Config, MemoryConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig, TrainConfig
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.cost import sequence_cost
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.parallel.context import ParallelContext

Result = dict[str, Any]
MICROBATCHES = 2
RECOMPUTED = {("qwen3-4b", 32768)}  # whose activations would not fit into 140 GB beside its optimizer


def run(parallel: ParallelContext, folder: Path, args: argparse.Namespace) -> Iterator[Result]:
    """One result a model, length and precision, as they come; what does not run has `error`."""
    models, lengths = (
        (["tiny"], [64]) if args.tiny else (args.models.split(","), [int(n) for n in args.tokens.split(",")])
    )
    for name in models:
        hf = shape(name, folder)
        matmul = matmul_flops(hf, parallel, args.repeats, is_tiny=args.tiny)
        for tokens in lengths:
            plain: float | None = None
            for recipe in ("none", *recipes()):
                found: Result = {"model": name, "tokens": tokens, "recipe": recipe, "matmul_tflops": matmul / 1e12}
                found |= attempt(hf, parallel, config_of(name, tokens, recipe, args), args)
                gc.collect()
                device.free_cached_memory()
                if "error" in found:
                    yield found
                    continue
                plain = plain or (found["seconds"] if recipe == "none" else None)
                yield found | against(found, matmul, plain)


def attempt(hf: HFConfig, parallel: ParallelContext, config: Config, args: argparse.Namespace) -> Result:
    """`one`, or the first line of what it raised as `error`: what does not fit, or a recipe that does not run."""
    try:
        return one(hf, parallel, config, args)
    except (RuntimeError, ValueError, AssertionError, FloatingPointError) as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}


def config_of(name: str, tokens: int, recipe: str, args: argparse.Namespace) -> Config:
    spec = "local" if args.tiny else "te"
    return Config(
        model=ModelConfig(dtype="bfloat16", layer_spec=spec, vocab_divisor=128),
        train=TrainConfig(batch_size=MICROBATCHES * tokens // _length(tokens, args), micro_batch_tokens=tokens),
        rollout=RolloutConfig(context_length=_length(tokens, args)),
        optimizer=OptimizerConfig(lr=1e-7),
        fp8=Fp8Config(recipe=recipe),
        memory=MemoryConfig(recompute="full" if (name, tokens) in RECOMPUTED else "none"),
    )


def one(hf: HFConfig, parallel: ParallelContext, config: Config, args: argparse.Namespace) -> Result:
    """Seconds, model FLOPs and peak memory of a step."""
    policy, optimizer = make_trainable(random_model(hf, config, parallel), config.optimizer, 1_000_000)
    length = config.rollout.context_length
    batch = full_rows(config.train.batch_size, length, hf.vocab_size, parallel.device)
    losses: list[float] = []
    step = measure(
        lambda: losses.append(train_step(policy, optimizer, batch, config)["grad_norm"]),
        repeats=args.repeats,
        warm_up=2,
    )
    assert all(math.isfinite(loss) for loss in losses)
    return {
        "parameters": parameter_count(policy),
        "seconds": step.seconds,
        "tokens_per_s": len(batch) * length / step.seconds,
        "flops": 3 * len(batch) * sequence_cost(hf)(length),
        "step_peak_gb": step.peak_bytes / 1e9,
        "recompute": config.memory.recompute,
    }


def against(found: Result, matmul: float, plain_seconds: float | None) -> Result:
    """MFU by the maker's figure and by the measured product; how much faster than bfloat16 the step is."""
    rate, peak = found["flops"] / found["seconds"], peak_flops()
    return {
        "mfu": rate / peak if peak else None,
        "of_matmul": rate / matmul,
        "speedup_over_bf16": plain_seconds / found["seconds"] if plain_seconds else None,
    }


def full_rows(rows: int, length: int, vocab_size: int, here: torch.device) -> ExperienceBatch:
    """Rows of one length, every token but the first trained on, old log-probs such that no ratio is clipped at once."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, length)
    mask[:, 0] = 0
    batch = ExperienceBatch(
        tokens=torch.randint(vocab_size, (rows, length), generator=g),
        loss_mask=mask,
        rollout_logprobs=torch.zeros(rows, length),
        rewards=torch.zeros(rows, dtype=torch.float64),
        group_ids=torch.arange(rows),
        old_logprobs=-math.log(vocab_size) * mask,
        ref_logprobs=-math.log(vocab_size) * mask,
        advantages=torch.randn(rows, length, generator=g) * mask,
    )
    return replace(batch, **{name: tensor.to(here) for name, tensor in batch.tensors().items()})


def matmul_flops(hf: HFConfig, parallel: ParallelContext, repeats: int, *, is_tiny: bool) -> float:
    """FLOP/s of plain torch products of the sizes of an MLP, the median of gate-and-up and down."""
    tokens, rates = 64 if is_tiny else 8192, []
    for outer, inner in ((2 * hf.ffn_hidden_size, hf.hidden_size), (hf.hidden_size, hf.ffn_hidden_size)):
        left = torch.randn(tokens, inner, dtype=torch.bfloat16, device=parallel.device)
        right = torch.randn(inner, outer, dtype=torch.bfloat16, device=parallel.device)
        times = 1 if is_tiny else 20

        def products(left: torch.Tensor = left, right: torch.Tensor = right, times: int = times) -> None:
            for _ in range(times):
                left @ right

        rates.append(times * 2 * tokens * outer * inner / measure(products, repeats=repeats).seconds)
    return statistics.median(rates)


def line(found: Result) -> str:
    """A row of the table."""
    what = f"{found['model']:9} {found['tokens']:6} tokens  {found['recipe']:10}"
    if "error" in found:
        return f"{what} {found['error']}"
    mfu = f"MFU {found['mfu']:5.1%}  " if found["mfu"] is not None else ""
    faster = f"{found['speedup_over_bf16']:.2f} x bf16" if found["speedup_over_bf16"] else ""
    return f"{what} {found['seconds']:7.3f} s  {mfu}of matmul {found['of_matmul']:5.1%}  {faster}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="llama-1b,qwen3-4b")
    parser.add_argument("--tokens", default="8192,32768", help="of a packed microbatch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")


def _length(tokens: int, args: argparse.Namespace) -> int:
    return min(tokens, args.length)


if __name__ == "__main__":
    from benchmarks.gpu.job import main

    main("train_step")
