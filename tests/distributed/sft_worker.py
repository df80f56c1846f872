"""One rank of several layouts in turn: `rpp sft` on the same demonstrations, padded and packed."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from megatron_rpp import sft
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, SftConfig, TrainConfig
from megatron_rpp.parallel import bootstrap
from tests.support.layouts_in_turn import take_layout

STEPS, LONGEST = 2, 40
LAYOUTS = {  # of two ranks: one launch for all
    "dp2": ParallelConfig(data=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
}
MODES = {"padded": 0, "packed": 64}  # train.micro_batch_tokens
CASES = [(name, mode) for name, layout in LAYOUTS.items() for mode in MODES if mode == "packed" or layout.context == 1]


class Unwatched:
    """In the watchdog's place."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def config_of(root: Path, layout: ParallelConfig, micro_batch_tokens: int, out: Path) -> Config:
    return Config(
        model=ModelConfig(),
        parallel=layout,
        rollout=RolloutConfig(context_length=LONGEST, max_response_tokens=LONGEST // 2),
        train=TrainConfig(micro_batch_size=2, micro_batch_tokens=micro_batch_tokens),
        # With a tiny epsilon Adam's first steps make whole updates of what is rounding in gradients near zero.
        optimizer=OptimizerConfig(weight_decay=0.1, adam_eps=1e-5),
        sft=SftConfig(
            init=str(root / "init"),
            data=str(root / "demonstrations.jsonl"),
            output=str(out),
            steps=STEPS,
            batch_size=12,
            lr=1e-3,
            warmup_steps=0,
        ),
    )


def main() -> None:
    root = Path(sys.argv[1])
    taken: list[dict[str, float]] = []
    take_step = sft.optimizer_step

    def recorded(*arguments: Any) -> tuple[dict[str, float], float]:
        sums, norm = take_step(*arguments)
        *_, train = arguments
        taken.append({**sums, "grad_norm": norm, "micro_batch_tokens": train.micro_batch_tokens})
        return sums, norm

    sft.optimizer_step = recorded
    first = None
    for name, mode in CASES:
        parallel = take_layout(f"{name}-{mode}", LAYOUTS[name], first)
        first = first or parallel
        out = root / f"{name}-{mode}"
        sft._train(config_of(root, LAYOUTS[name], MODES[mode], out), parallel, Unwatched())  # type: ignore[arg-type]
        if parallel.rank == 0:
            (root / f"{name}-{mode}.json").write_text(json.dumps(taken))
        taken.clear()
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
