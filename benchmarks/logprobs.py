"""Peak memory and time of log-probs and entropy, forward and backward, against plain float32 autograd.

    python -m benchmarks.logprobs [--tokens 8192] [--vocab 131072] [--chunk-tokens 64]
                                  [--entropy-gradient] [--deviation 1.0]

Both start from bfloat16 logits [tokens, vocab] and end with their bfloat16 gradient, at temperature 0.7:

    fused    vocab_parallel_logprobs in compiled kernels, the gradient in the memory of the logits, as in training
    chunked  the same without a compiler, a chunk of tokens at a time
    copying  the same, the gradient in memory of its own
    naive    log_softmax(logits.float() / temperature), of which the log-probs are gathered and the entropy
             is -sum(exp(.) * .): the same float32 log-probs serve both, and autograd goes back

The entropy is a metric without gradient, the cheaper case for `naive`, unless --entropy-gradient adds an
entropy bonus to the loss. Each path runs once, in a process of its own. Memory is the peak of its resident
set (VmHWM) less its resident set just before, with the logits in place: the gradient counts where it needs
memory. What is compiled is so before, and not measured.

On float32 logits of a smaller size, with gradients of both outputs: `difference` is between `chunked` and
`naive`, `error` between `chunked` and the naive path in float64, `error_of_naive` between the naive paths in
float32 and float64. The last line is one JSON object; its ratios are chunked / naive, or fused / naive where they
say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor

from benchmarks.measure import measure
from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs

TEMPERATURE = 0.7
OUTPUTS = ("logprob", "entropy", "gradient")
SMALL = (1024, 8192)  # tokens and vocabulary where the differences are measured
FLOAT32_TENSORS_OF_NAIVE = {False: 3, True: 5}  # by --entropy-gradient: what is alive at once at its peak
Path = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [T, V], targets [T] -> logprobs, entropy [T]


def main() -> None:
    args = _arguments()
    _check_memory(args)
    found = _measured(args)
    ours, naive = found["chunked"], found["naive"]
    input_bytes = args.tokens * args.vocab * 2
    result = {
        "tokens": args.tokens,
        "vocab": args.vocab,
        "chunk_tokens": args.chunk_tokens,
        "entropy_gradient": args.entropy_gradient,
        "memory_ratio": ours["peak_bytes"] / naive["peak_bytes"],
        "memory_ratio_with_input": (input_bytes + ours["peak_bytes"]) / (input_bytes + naive["peak_bytes"]),
        "memory_ratio_copying": found["copying"]["peak_bytes"] / naive["peak_bytes"],
        "time_ratio": ours["seconds"] / naive["seconds"],
        "cpu_time_ratio": ours["cpu_seconds"] / naive["cpu_seconds"],
        "memory_ratio_fused": found["fused"]["peak_bytes"] / naive["peak_bytes"],
        "time_ratio_fused": found["fused"]["seconds"] / naive["seconds"],
        "time_ratio_fused_to_chunked": found["fused"]["seconds"] / ours["seconds"],
        **differences(args.chunk_tokens, args.deviation),
    }
    print(f"logits [{args.tokens}, {args.vocab}] bfloat16: {input_bytes / 2**20:.0f} MiB")
    for name, path in found.items():
        memory = f"peak {path['peak_bytes'] / 2**20:6.0f} MiB above the logits"
        print(f"{name:8} {memory}  {path['seconds']:6.1f} s  {path['cpu_seconds']:6.1f} s of CPU")
    for kind in ("difference", "error", "error_of_naive"):
        values = (f"{output} {result[f'max_{output}_{kind}']:.1e}" for output in OUTPUTS)
        print(f"{kind:14} {'  '.join(values)}")
    print(json.dumps({**result, **found}))


def chunked(
    logits: Tensor, targets: Tensor, *, chunk_tokens: int, overwrite: bool, fused: bool = False
) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logprobs(
        logits,
        targets,
        vocab_size=logits.shape[1],
        temperature=TEMPERATURE,
        chunk_tokens=chunk_tokens,
        overwrite_logits=overwrite,
        fused=fused,
    )


def naive(
    logits: Tensor, targets: Tensor, *, entropy_gradient: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    distribution = (logits.to(dtype) / TEMPERATURE).log_softmax(dim=1)
    logprobs = distribution.gather(1, targets[:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_gradient):
        return logprobs, -(distribution.exp() * distribution).sum(dim=1)


def backward(
    path: Path, logits: Tensor, targets: Tensor, upstream: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [T], entropy [T], gradient [T, V]); `upstream` [2, T] weighs log-probs and entropy in the loss."""
    logprobs, entropy = path(logits, targets)
    loss = (logprobs * upstream[0]).sum()
    if entropy_gradient:
        loss = loss + (entropy * upstream[1]).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return logprobs.detach(), entropy.detach(), gradient


def make_inputs(tokens: int, vocab: int, dtype: torch.dtype, deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normal logits [T, V], targets [T] that are likely, normal upstream [2, T])."""
    torch.manual_seed(0)
    logits = torch.empty(tokens, vocab, dtype=dtype).normal_(std=deviation)
    targets = logits[:, :4096].argmax(dim=1)
    return logits.requires_grad_(), targets, torch.randn(2, tokens)


def differences(chunk_tokens: int, deviation: float) -> dict[str, float]:
    """Largest differences on float32 logits of size SMALL, as the head of this file names them."""
    inputs = make_inputs(*SMALL, torch.float32, deviation)
    path = partial(chunked, chunk_tokens=chunk_tokens, overwrite=False)
    ours = backward(path, *inputs, entropy_gradient=True)
    theirs = backward(partial(naive, entropy_gradient=True), *inputs, entropy_gradient=True)
    logits, targets, upstream = inputs
    exact = backward(
        partial(naive, entropy_gradient=True, dtype=torch.float64),
        logits.detach().double().requires_grad_(),  # or the gradient would be rounded to float32
        targets,
        upstream,
        entropy_gradient=True,
    )
    pairs = {"difference": (ours, theirs), "error": (ours, exact), "error_of_naive": (theirs, exact)}
    return {
        f"max_{output}_{kind}": (a - b).abs().max().item()
        for kind, (first, second) in pairs.items()
        for output, a, b in zip(OUTPUTS, first, second, strict=True)
    }


def run(path: Path, entropy_gradient: bool, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward of one path, for `measure`."""
    result = backward(path, *inputs, entropy_gradient)
    assert all(torch.isfinite(x).all() for x in result[:2])


def _measured(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    paths: dict[str, Path] = {
        "fused": partial(chunked, chunk_tokens=args.chunk_tokens, overwrite=True, fused=True),
        "chunked": partial(chunked, chunk_tokens=args.chunk_tokens, overwrite=True),
        "copying": partial(chunked, chunk_tokens=args.chunk_tokens, overwrite=False),
        "naive": partial(naive, entropy_gradient=args.entropy_gradient),
    }
    large = partial(make_inputs, args.tokens, args.vocab, torch.bfloat16, args.deviation)
    small = partial(make_inputs, 8, args.vocab, torch.bfloat16, args.deviation)  # kernels are of one vocabulary
    return {name: measure(partial(run, path, args.entropy_gradient), large, small) for name, path in paths.items()}


def _check_memory(args: argparse.Namespace) -> None:
    tensors = FLOAT32_TENSORS_OF_NAIVE[args.entropy_gradient]
    needed = args.tokens * args.vocab * (2 + 4 * tensors) + 2**30
    free = psutil.virtual_memory().available
    if free < needed:
        sys.exit(f"the naive path needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free; try fewer --tokens")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--entropy-gradient", action="store_true", help="differentiate the entropy too")
    parser.add_argument("--deviation", type=float, default=1.0, help="standard deviation of the logits")
    return parser.parse_args()


if __name__ == "__main__":
    main()
