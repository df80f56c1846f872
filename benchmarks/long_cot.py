"""Long chain-of-thought on a recorded long-tail length distribution: packing, balance, and idle time of the rollout.

    python -m benchmarks.long_cot [--part all|train|rollout|schedule] [--scale 16] [--rows 32] [--repeats 3]
        [--rollout-scale 64] [--rollout-steps 13] [--rollout-modes over_sampling_1.5 ...] [--dir FOLDER]

benchmarks/data/long_cot_lengths.json has the lengths, up to 30,000 tokens, and where they are from. On CPU:

- train: scoring and training steps on the same rows, equally spaced quantiles of the recorded ones, in turns: packed
  (train.micro_batch_tokens), padded to the longest of the batch, padded to the longest that there may be.
  Lengths and the width of the model are those of Qwen2.5-7B over --scale, so that attention and everything else keep
  their proportion; 2 of its 28 layers. A microbatch holds at most as many positions in every mode: one row of the
  largest size.
- balance: predicted cost of 8 replicas, at full length, for Qwen2.5-7B; nothing is trained.
- schedule: the scheduling alone, on a clock that jumps, with servers whose speed no load changes
  (benchmarks/long_cot_schedule.py); part of `rollout`.
- rollout: the loop with a real SGLang server, without and with over-sampling (schedule.over_sampling), where each
  response is as long as a recorded one over --rollout-scale.

The last line is one JSON object. speedup_over_padding: seconds of the steps padded to the maximum over those packed
(medians; cpu_speedup_over_padding is of CPU seconds, which other work on the machine spoils less). padding_waste: share
of the positions that the model ran over, packed, which held no token. dp_imbalance: predicted cost of the largest
replica over the mean, less 1, mean over optimizer steps. idle_fraction by mode: of the engine, 1 - used slots /
(slots x time) over whole steps, a slot being a request that the server may run at once; of the trainer, the share of a
step's time in which it waits for responses. rollout_s and tail_s by mode: seconds of a step's sampling, and of these
with fewer than half of a plain step's requests running; rollout_ratio and tail_ratio: over those of the plain mode.
model_rollout_ratio and model_wasted_tokens by mode: of `schedule`, time over that of the plain mode, and the share of
the sampled tokens that nobody trains on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_cot_lengths import MODES, Lengths, load
from megatron_rpp.parallel.local_launch import launch_local

Result = dict[str, Any]
SAMPLES = 8  # a prompt, in the training half; --rows is a multiple of it


def main() -> None:
    args = _arguments()
    lengths = load()
    found: Result = {"lengths": lengths.describe()}
    print_lengths(found["lengths"])
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="long-cot-") as scratch:
        if args.part in ("all", "train"):
            found |= train_part(lengths, Path(scratch), args)
        if args.part in ("all", "rollout", "schedule"):
            from benchmarks.long_cot_schedule import model_part, print_model

            found |= model_part(lengths, steps=150)
            print_model(found)
        if args.part in ("all", "rollout"):
            from benchmarks.long_cot_rollout import rollout_part

            found |= rollout_part(lengths, Path(scratch), args.rollout_scale, args.rollout_steps, args.rollout_modes)
    print(json.dumps(found))


def train_part(lengths: Lengths, folder: Path, args: argparse.Namespace) -> Result:
    """Packing and balance."""
    from benchmarks.long_cot_balance import dp_imbalance

    short = lengths.scaled(args.scale)
    rows = [short.prompt_tokens + tokens for tokens in short.quantiles(args.rows)]
    random.Random(0).shuffle(rows)
    modes = run_training(short, rows, folder, args.scale, args.repeats)
    found = summarize_training(modes, rows)
    print_training(found)
    balance = dp_imbalance(lengths, steps=20)
    print_balance(balance)
    return {**found, **balance}


def run_training(lengths: Lengths, rows: Sequence[int], folder: Path, scale: int, repeats: int) -> Result:
    """What benchmarks/long_cot_train.py has measured; ends this process where it fails."""
    write_qwen(folder / "model", scale, positions=lengths.longest_row)
    given, out, run_dir = folder / "lengths.json", folder / "result.json", folder / "run"
    given.write_text(json.dumps({"rows": list(rows), "prompt": lengths.prompt_tokens}))
    settings = {
        "run.dir": run_dir, "model.path": folder / "model", "algorithm.kl_coef": 0,
        "algorithm.num_samples_per_prompt": SAMPLES, "rollout.context_length": lengths.longest_row,
        "rollout.max_response_tokens": lengths.limit, "train.micro_batch_tokens": lengths.longest_row,
        "train.micro_batch_size": 1, "train.batch_size": len(rows) // 2, "optimizer.lr": 1e-9,
    }  # fmt: skip
    words = [str(out), str(given), str(repeats), *(f"--{key}={value}" for key, value in settings.items())]
    code = launch_local([sys.executable, "-m", "benchmarks.long_cot_train", *words], 1, run_dir)
    if code:
        sys.exit(code)
    found: Result = json.loads(out.read_text())
    return found


def write_qwen(folder: Path, scale: int, *, positions: int) -> None:
    """A random model with the proportions of Qwen2.5-7B, `scale` times narrower, of 2 layers and with 7 heads.

    The vocabulary has the share in the work that it has there, beside 28 layers.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=152_064 // scale * 2 // 28,
        hidden_size=3584 // scale,
        intermediate_size=18_944 // scale,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def summarize_training(modes: Mapping[str, Result], rows: Sequence[int]) -> Result:
    """Rates and ratios. tokens_per_s counts the tokens of prompts and responses, not padding."""
    tokens = sum(rows)
    kinds = ("seconds", "score_seconds", "cpu_seconds")
    seconds, scoring, cpu = ({mode: statistics.median(of[kind]) for mode, of in modes.items()} for kind in kinds)
    waste = {mode: 1 - tokens / found["positions"] for mode, found in modes.items()}
    norms = [found["grad_norm"] for found in modes.values()]
    packed, batch, maximum = "packed", "padded_to_batch", "padded_to_maximum"
    return {
        "rows": len(rows),
        "tokens": tokens,
        "step_s": seconds,
        "tokens_per_s": {mode: tokens / s for mode, s in seconds.items()},
        "speedup_over_padding": seconds[maximum] / seconds[packed],
        "speedup_over_padding_to_batch": seconds[batch] / seconds[packed],
        "cpu_speedup_over_padding": cpu[maximum] / cpu[packed],
        "scoring_speedup_over_padding": scoring[maximum] / scoring[packed],
        "padding_waste": waste[packed],
        "padding_waste_by_mode": waste,
        "grad_norm_difference": (max(norms) - min(norms)) / max(norms),
    }


def print_lengths(found: Mapping[str, float]) -> None:
    words = (f"{name} {found[name]:,.0f}" for name in ("responses", "prompts", "mean", "median", "p95", "max"))
    print(f"recorded: {', '.join(words)}; {found['at_limit']:.1%} at the limit", flush=True)


def print_training(found: Result) -> None:
    print(f"{found['rows']} rows, {found['tokens']:,} tokens; score and train:")
    for mode, seconds in found["step_s"].items():
        rate, waste = found["tokens_per_s"][mode], found["padding_waste_by_mode"][mode]
        print(f"{mode:20} {seconds:7.2f} s  {rate:8,.0f} tokens/s  {waste:6.1%} padding", flush=True)
    maximum, longest = found["speedup_over_padding"], found["speedup_over_padding_to_batch"]
    print(f"packed against padded to the maximum: {maximum:.2f} x, to the batch's longest: {longest:.2f} x")
    cpu, scoring = found["cpu_speedup_over_padding"], found["scoring_speedup_over_padding"]
    print(f"the former in CPU seconds: {cpu:.2f} x, in scoring alone: {scoring:.2f} x")
    print(f"gradient norms agree within {found['grad_norm_difference']:.1e}", flush=True)


def print_balance(found: Mapping[str, float]) -> None:
    for key, name in (("dp_imbalance", "dealt by cost"), ("dp_imbalance_as_sampled", "as sampled")):
        print(f"8 replicas, {name:14} imbalance {found[key]:6.1%}, at worst {found[f'{key}_worst']:6.1%}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "train", "rollout", "schedule"), default="all")
    parser.add_argument("--scale", type=int, default=16, help="of lengths and the model's width; 8, 16 or 32")
    parser.add_argument("--rows", type=int, default=32, help="responses of a step, in the training half")
    parser.add_argument("--repeats", type=int, default=3, help="of the training half")
    parser.add_argument("--rollout-scale", type=int, default=64, help="of lengths in the rollout half; at least 32")
    parser.add_argument("--rollout-steps", type=int, default=13, help="of each mode; the first is not counted")
    parser.add_argument("--rollout-modes", nargs="*", default=list(MODES), choices=list(MODES), help="beside plain")
    parser.add_argument("--dir", help="where to work (default: the system's temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
