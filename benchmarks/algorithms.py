"""REINFORCE++, its baseline variant, GRPO and RLOO on the demo task, from one warm start, over several seeds.

    python -m benchmarks.algorithms [--out runs/benchmark-algorithms] [--seeds 3] [--steps 48]

Two tasks, each with real Megatron-Core training and a real SGLang server:

- `sums`: 7,588 two-digit sums to practise on, 512 others held out.
- `mixed`: 32 two-digit sums, seen again and again, with 32 one-digit sums that the warm start has mastered
  mixed in; what is learnt of the 32 against the held-out 512 is over-fitting.

Writes OUT/algorithms.png and OUT/algorithms.md and prints the table; the last line is one JSON object. A run
that is there already, complete, is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.make_demo import Sum, make_demonstrations, problem, write_jsonl
from megatron_rpp.observability.rollouts import rollouts_path
from megatron_rpp.observability.writers import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL = 0.001
ALGORITHMS: dict[str, dict[str, Any]] = {
    "REINFORCE++": {"preset": "paper", "kl_coef": KL},
    "REINFORCE++-baseline": {"preset": "paper_baseline", "kl_loss_coef": KL},
    "GRPO": {"preset": "grpo", "kl_loss_coef": KL},
    "RLOO": {"preset": "rloo", "kl_coef": KL},
}
TASKS = ("sums", "mixed")
HARD, EASY = 32, 32  # prompts of the task `mixed`
LAST = 8  # steps that the final training figures are over

Steps = list[dict[str, Any]]
Runs = dict[str, dict[str, list[Path]]]  # task -> algorithm -> run directory of each seed


def main() -> None:
    args = _arguments()
    out = Path(args.out)
    started = time.monotonic()
    prepare(out)
    runs = train_all(out, range(args.seeds), args.steps)
    rows = [summary(task, name, runs[task][name]) for task in TASKS for name in ALGORITHMS]
    table = markdown(rows)
    (out / "algorithms.md").write_text(table)
    draw(runs, out / "algorithms.png")
    print(table)
    print(json.dumps({"steps": args.steps, "seeds": args.seeds, "seconds": time.monotonic() - started, "rows": rows}))


def prepare(out: Path) -> None:
    """Data and the one warm start of all runs."""
    start = out / "start"
    if (out / "sft" / "config.json").exists():
        return
    _run(sys.executable, "examples/make_demo.py", "--out", str(start), log=out / "make_demo.txt")
    rng = random.Random(1)
    easy = [(a, b) for a in range(10) for b in range(10)]
    hard = [_pair(json.loads(line)) for line in (start / "train.jsonl").open()]
    demonstrations = [json.loads(line) for line in (start / "demonstrations.jsonl").open()]
    mastered = list(make_demonstrations(rng, easy, len(demonstrations) // 10, wrong_fraction=0.0))
    write_jsonl(start / "demonstrations.jsonl", demonstrations + mastered)
    write_jsonl(start / "mixed.jsonl", map(problem, hard[:HARD] + rng.sample(easy, EASY)))
    write_jsonl(start / "sums.jsonl", map(problem, hard))
    settings = [f"--sft.init={start / 'init'}", f"--sft.data={start / 'demonstrations.jsonl'}"]
    settings += [f"--sft.output={out / 'sft'}", f"--run.dir={out / 'warm-start'}", "--parallel.pipeline=1"]
    _rpp("sft", settings, out / "sft.txt")


def train_all(out: Path, seeds: Sequence[int], steps: int) -> Runs:
    """Every algorithm on every task with every seed, seeds outermost."""
    runs: Runs = {task: {name: [] for name in ALGORITHMS} for task in TASKS}
    total, done = len(TASKS) * len(ALGORITHMS) * len(seeds), 0
    for seed in seeds:
        for task in TASKS:
            for name, settings in ALGORITHMS.items():
                run_dir = out / "runs" / f"{task}-{settings['preset']}-seed{seed}"
                seconds = train(out, run_dir, task, settings, seed, steps)
                runs[task][name].append(run_dir)
                done += 1
                print(f"{done}/{total} {run_dir.name}: {seconds:.0f} s", flush=True)
    return runs


def train(out: Path, run_dir: Path, task: str, algorithm: dict[str, Any], seed: int, steps: int) -> float:
    """One run, unless it is there; seconds."""
    started = time.monotonic()
    if len(_steps_of(run_dir)) < steps:
        if run_dir.exists():
            run_dir.rename(run_dir.with_name(f"{run_dir.name}-until-{int(time.time())}"))
        settings = {
            "run.dir": run_dir, "run.seed": seed, "run.steps": steps, "model.path": out / "sft",
            "parallel.pipeline": 1, "data.train.path": out / "start" / f"{task}.jsonl",
            "data.evals.sums.path": out / "start" / "eval.jsonl", "rollout.num_prompts": 32, "train.batch_size": 64,
            "train.micro_batch_size": 64, "optimizer.lr": 1e-4, "optimizer.warmup_steps": 20,
            "eval.interval": steps // 3, "checkpoint.interval": 0,
            **{f"algorithm.{key}": value for key, value in algorithm.items()},
        }  # fmt: skip
        _rpp("train", [f"--{key}={value}" for key, value in settings.items()], run_dir.with_suffix(".txt"))
    return time.monotonic() - started


def summary(task: str, name: str, run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Final figures of one algorithm on one task: mean over seeds, and standard deviation as `NAME_sd`."""
    figures: dict[str, list[float]] = {"held_out": [], "held_out_greedy": [], "train": [], "kl": [], "gap": []}
    for run_dir in run_dirs:
        steps = _steps_of(run_dir)
        trained_on = hard_accuracy(run_dir, [record["step"] for record in steps[-LAST:]])
        figures["held_out"].append(steps[-1]["eval/sums/accuracy"])
        figures["held_out_greedy"].append(steps[-1]["eval/sums/greedy_accuracy"])
        figures["train"].append(trained_on)
        figures["kl"].append(statistics.fmean(record["kl/mean"] for record in steps[-LAST:]))
        figures["gap"].append(trained_on - steps[-1]["eval/sums/accuracy"])
    row: dict[str, Any] = {"task": task, "algorithm": name}
    for key, values in figures.items():
        row[key], row[f"{key}_sd"] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return row


def hard_accuracy(run_dir: Path, steps: Iterable[int]) -> float:
    """Share of right responses to two-digit sums among the training rollouts of `steps`."""
    rewards = []
    for step in steps:
        for record in map(json.loads, rollouts_path(run_dir, step).open()):
            if len(record["prompt"]) == len("12 + 34="):
                rewards.append(record["reward"])
    return statistics.fmean(rewards)


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| task | algorithm | held-out, sampled | held-out, greedy | two-digit sums in training | gap | KL per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{100 * row[k]:.1f} ± {100 * row[f'{k}_sd']:.1f}" for k in ("held_out", "held_out_greedy", "train", "gap")
        ]
        lines.append(
            " | ".join([f"| {row['task']}", row["algorithm"], *cells, f"{row['kl']:.3f} ± {row['kl_sd']:.3f} |"])
        )
    return "\n".join(lines) + "\n"


def draw(runs: Runs, path: Path) -> None:
    """One row a task: reward against step, reward against KL spent, held-out accuracy against step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(TASKS), 3, figsize=(15, 8), layout="constrained")
    for row, task in zip(grid, TASKS, strict=True):
        for color, name in enumerate(ALGORITHMS):
            seeds = [_steps_of(run_dir) for run_dir in runs[task][name]]
            _band(row[0], seeds, lambda s: (s["step"], s["reward/mean"]), f"C{color}", name, smooth=4)
            _scatter(row[1], seeds, f"C{color}", name)
            held_out = [[s for s in steps if "eval/sums/accuracy" in s] for steps in seeds]
            _band(row[2], held_out, lambda s: (s["eval/policy_version"], s["eval/sums/accuracy"]), f"C{color}", name)
        row[0].set(title=f"{task}: reward", xlabel="step", ylabel="sampled reward (mean of 4 steps)")
        row[1].set(title=f"{task}: reward against KL spent", xlabel="KL per token to the reference (nats)")
        row[2].set(title=f"{task}: held-out accuracy, sampled", xlabel="step")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _band(
    axes: Axes,
    seeds: Sequence[Steps],
    point: Callable[[dict[str, Any]], tuple[float, float]],
    color: str,
    name: str,
    smooth: int = 1,
) -> None:
    """The mean over seeds as a line, lowest to highest as a band."""
    x = [point(record)[0] for record in seeds[0]][smooth - 1 :]
    curves = [_smoothed([point(record)[1] for record in steps], smooth) for steps in seeds]
    axes.plot(x, [statistics.fmean(values) for values in zip(*curves, strict=True)], color=color, label=name)
    lowest, highest = (list(map(f, zip(*curves, strict=True))) for f in (min, max))
    axes.fill_between(x, lowest, highest, color=color, alpha=0.15)


def _scatter(axes: Axes, seeds: Sequence[Steps], color: str, name: str) -> None:
    for steps in seeds:
        kl, reward = (_smoothed([s[key] for s in steps], 4) for key in ("kl/mean", "reward/mean"))
        axes.plot(kl, reward, ".", color=color, alpha=0.5, label=name if steps is seeds[0] else None)


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    return [statistics.fmean(values[i - width : i]) for i in range(width, len(values) + 1)]


def _steps_of(run_dir: Path) -> Steps:
    return read_metrics(run_dir) if run_dir.exists() else []


def _pair(record: dict[str, Any]) -> Sum:
    a, _, b = record["expression"].split()
    return int(a), int(b)


def _rpp(command: str, settings: Sequence[str], log: Path) -> None:
    _run(sys.executable, "-m", "megatron_rpp.cli", command, "examples/demo_cpu.toml", *settings, log=log)


def _run(*argv: str, log: Path) -> None:
    """Run to the end, with its output in `log`; raises CalledProcessError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/benchmark-algorithms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    return parser.parse_args()


if __name__ == "__main__":
    main()
