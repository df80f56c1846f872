"""The picture and the sentence of a run, from its metrics.jsonl."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rpp.observability.held_out import set_names
from megatron_rpp.observability.writers import metrics_path, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Steps = list[dict[str, Any]]


def draw(run_dir: str | Path) -> Path:
    """Write RUN_DIR/curve.png: reward and held-out accuracy above, KL below.

    Raises:
        ValueError: there is no metrics.jsonl with a step in it.
    """
    steps = _read(run_dir)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    _line(upper, steps, "reward/mean", "sampled reward", color="0.6", linewidth=1)
    for number, name in enumerate(set_names(steps)):
        prefix, of_set, color = (f"eval/{name}/", f" of {name}", f"C{number + 3}") if name else ("eval/", "", "C0")
        _line(upper, steps, prefix + "accuracy", f"held-out accuracy{of_set}, sampled", color=color, marker="o")
        greedy = {"color": color if name else "C1", "marker": "s", "linestyle": "--" if name else "-"}
        _line(upper, steps, prefix + "greedy_accuracy", f"held-out accuracy{of_set}, greedy", **greedy)
        _line(upper, steps, prefix + "reward", f"held-out reward{of_set}, sampled", color=color, marker="o")
    upper.set_ylabel("reward, accuracy")
    _line(lower, steps, "kl/mean", "KL to the reference", color="C2")
    lower.set_ylabel("KL per token (nats)")
    lower.set_xlabel("step (one rollout batch)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="best")
    upper.set_title(_title(Path(run_dir)))
    path = Path(run_dir) / "curve.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def summary(run_dir: str | Path) -> str:
    """How many steps there are, and the first and last held-out accuracy. Raises ValueError as `draw`."""
    steps = _read(run_dir)
    parts = [f"{len(steps)} steps"]
    for name in set_names(steps):
        prefix, of_set = (f"eval/{name}/", f" of {name}") if name else ("eval/", "")
        for key, words in (("accuracy", "held-out accuracy"), ("greedy_accuracy", "greedy accuracy")):
            if points := _points(steps, prefix + key):
                (first_step, first), (last_step, last) = points[0], points[-1]
                change = f"{first:.1%} (step {first_step}) -> {last:.1%} (step {last_step})"
                parts.append(f"{words}{of_set} {change}, {100 * (last - first):+.1f} points")
        if points := _points(steps, prefix + "reward"):
            (first_step, first), (last_step, last) = points[0], points[-1]
            parts.append(f"held-out reward{of_set} {first:.3f} (step {first_step}) -> {last:.3f} (step {last_step})")
    return "; ".join(parts) if len(parts) > 1 else f"{parts[0]}; never evaluated"


def _title(run_dir: Path) -> str:
    """The run's name, and the preset that its config.toml names."""
    config = run_dir / "config.toml"
    settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    preset = settings.get("algorithm", {}).get("preset", "")
    return f"{run_dir.resolve().name}, preset {preset}" if preset else run_dir.resolve().name


def _read(run_dir: str | Path) -> Steps:
    steps = read_metrics(run_dir)
    if not steps:
        raise ValueError(f"{metrics_path(run_dir)} holds no steps; give the run.dir of a run that has trained")
    return steps


def _points(steps: Steps, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in steps if key in record]


def _line(axes: Axes, steps: Steps, key: str, label: str, **style: Any) -> None:
    points = _points(steps, key)
    if points:
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
