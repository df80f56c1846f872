"""Cost and peak memory of REINFORCE++ advantages over 4M tokens, against a naive float64 implementation.

    python -m benchmarks.advantages [--rows 512] [--columns 8192] [--gamma 1.0]

The reference is what one writes first: a loop over positions for the returns, then all advantages of the
batch joined in one float64 vector and normalized. The last line is one JSON object; its ratios are ours / naive.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import measure
from megatron_rpp.algorithm import compute_advantages

KL_COEF = 0.01
REPEATS = 3
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # rewards [B], kl [B, S], loss_mask [B, S], group_ids [B]


def main() -> None:
    args = _arguments()
    large, small = partial(make_inputs, args.rows, args.columns), partial(make_inputs, 8, 16)
    ours, naive = (
        measure(partial(function, args.gamma), large, small, REPEATS)
        for function in (packaged_advantages, naive_advantages)
    )
    inputs = make_inputs(64, 500)
    difference = packaged_advantages(args.gamma, inputs) - naive_advantages(args.gamma, inputs)
    result = {
        "tokens": args.rows * args.columns,
        "response_tokens": int(make_inputs(args.rows, args.columns)[2].sum()),
        "time_ratio": ours["seconds"] / naive["seconds"],
        "memory_ratio": ours["peak_bytes"] / naive["peak_bytes"],
        "max_difference": difference.abs().max().item(),
    }
    for name, found in (("megatron_rpp", ours), ("naive float64", naive)):
        print(f"{name:14} {found['seconds']:6.2f} s (median of {REPEATS})  peak {found['peak_bytes'] / 2**20:7.0f} MiB")
    print(json.dumps({**result, "ours": ours, "naive": naive}))


def packaged_advantages(gamma: float, inputs: Inputs) -> Tensor:
    return compute_advantages(*inputs, kl_coef=KL_COEF, gamma=gamma)


def naive_advantages(gamma: float, inputs: Inputs) -> Tensor:
    """[B, S] float64: a loop over positions, then a mean and a deviation over all response tokens."""
    rewards, kl, loss_mask, _ = inputs
    token_rewards = -KL_COEF * kl.double()
    for row, mask in enumerate(loss_mask):
        token_rewards[row, mask.nonzero().max()] += rewards[row].double()
    returns = torch.zeros_like(token_rewards)
    running = torch.zeros(len(rewards), dtype=torch.float64)
    for t in reversed(range(kl.shape[1])):
        inside = loss_mask[:, t].bool()
        running = torch.where(inside, token_rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    every = torch.cat([row[mask.bool()] for row, mask in zip(returns, loss_mask, strict=True)])
    mean, deviation = every.mean(), every.std(correction=0).clamp(min=1e-4)
    return (returns - mean) / deviation * loss_mask.double()


def make_inputs(rows: int, columns: int) -> Inputs:
    """Responses of 10 % to 100 % of the columns, right-padded, in groups of 4."""
    g = torch.Generator().manual_seed(0)
    lengths = (columns * (0.1 + 0.9 * torch.rand(rows, 1, generator=g))).long()
    loss_mask = (torch.arange(columns) < lengths).float()
    return torch.rand(rows, generator=g), torch.randn(rows, columns, generator=g), loss_mask, torch.arange(rows) // 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--gamma", type=float, default=1.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
