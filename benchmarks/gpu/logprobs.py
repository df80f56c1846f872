"""Log-probs and entropy, forward and backward, from bfloat16 logits on one GPU: fused, chunked and naive.

    python -m benchmarks.gpu.logprobs [--tiny] [--rows 8192] [--vocab 131072] [--repeats 3]

`naive` is benchmarks/logprobs.py's: float32 log_softmax and autograd. Memory is the peak above the logits; fused and
chunked write the gradient over the logits, as in training. Ratios are naive / ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Measured, measure
from benchmarks.logprobs import TEMPERATURE, backward, naive
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs

Result = dict[str, Any]


def run(parallel: ParallelContext, folder: Path, args: argparse.Namespace) -> Iterator[Result]:
    """One result a path."""
    rows, vocab = (8, 64) if args.tiny else (args.rows, args.vocab)
    torch.manual_seed(0)
    targets = torch.randint(vocab, (rows,), device=parallel.device)
    upstream = torch.randn(2, rows, device=parallel.device)
    plain: Measured | None = None
    for name, path in paths().items():
        logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=parallel.device).requires_grad_()
        found = measure(partial(backward, path, logits, targets, upstream, False), repeats=args.repeats)
        plain = plain or found
        yield {
            "path": name,
            "logits": [rows, vocab],
            "seconds": found.seconds,
            "peak_bytes": found.peak_bytes,
            "times_faster": plain.seconds / found.seconds,
            "times_less_memory": plain.peak_bytes / found.peak_bytes if found.peak_bytes else None,
        }


def paths() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The naive one first."""
    return {"naive": partial(naive, entropy_gradient=False), **{n: partial(ours, fused=n == "fused") for n in OURS}}


OURS = ("chunked", "fused")


def ours(logits: Tensor, targets: Tensor, *, fused: bool) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logprobs(
        logits, targets, vocab_size=logits.shape[1], temperature=TEMPERATURE, overwrite_logits=True, fused=fused
    )


def line(found: Result) -> str:
    """A row of the table."""
    memory = f"{found['peak_bytes'] / 2**20:8.0f} MiB above the logits"
    less = f"  {found['times_less_memory']:.1f} x less memory" if found["times_less_memory"] else ""
    return (
        f"log-probs {found['path']:8} {found['seconds']:8.4f} s  {found['times_faster']:5.1f} x faster  {memory}{less}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=8192, help="tokens whose log-probs are computed")
    parser.add_argument("--vocab", type=int, default=131_072)


if __name__ == "__main__":
    from benchmarks.gpu.job import main

    main("logprobs")
