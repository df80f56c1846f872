"""Are two checkpoints the same? Hugging Face or Megatron directories, in any pair.

    python -m checkpoint_tools.compare A B [--atol X] [--hf MODEL_DIR] [--allow-pickle]
    python -m checkpoint_tools.compare A [B] --logits [--tensor N] [--pipeline N] [--atol X]

Tensors are compared one at a time under their Hugging Face names: the same bits and dtype (FP8 weights as
they are read, in bfloat16), or with --atol values that differ by no more than it. With --logits, Megatron
runs each directory in float32 on a few random token rows, and must agree with transformers on the first
Hugging Face directory (--atol 1e-4).

Exit code 0: the same; 1: different; 2: an error that the user can mend, told in one line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.command import not_negative, parser, positive, run
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.parallel.environment import find_rank

TOOL = "compare"
LOGITS_ATOL = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser(TOOL, __doc__)
    options.add_argument("paths", metavar="DIR", nargs="+", help="one or two directories")
    options.add_argument("--atol", type=not_negative, help="largest difference that is accepted (default: none at all)")
    options.add_argument("--hf", metavar="MODEL_DIR", help="config.json of Megatron directories that have none")
    options.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, as weights alone")
    options.add_argument("--logits", action="store_true", help="compare logits with transformers'")
    options.add_argument("--tensor", type=positive, default=1, help="tensor-parallel size for --logits")
    options.add_argument("--pipeline", type=positive, default=1, help="pipeline-parallel size for --logits")
    asked = options.parse_args(words)
    if len(asked.paths) > 2 or (len(asked.paths) < 2 and not asked.logits):
        options.error("name two directories (one is enough with --logits)")
    if asked.logits and asked.hf:
        options.error("--hf goes with a comparison of tensors; --logits needs a config.json in each directory")
    if asked.logits:
        return _logits(asked, words)
    return run(TOOL, lambda: _tensors(asked))


def _tensors(asked: argparse.Namespace) -> int:
    from megatron_rpp.conversion.difference import differences
    from megatron_rpp.conversion.sources import open_source

    pickles = asked.allow_pickle
    sources = [open_source(path, _config_from(path, asked.hf), allow_pickle=pickles) for path in asked.paths]
    found = 0
    for difference in differences(sources[0], sources[1], asked.atol):
        found += 1
        sys.stdout.write(f"{difference.name}: {difference.what}\n")
        sys.stdout.flush()
    total = len(sources[0].tensors.keys() | sources[1].tensors.keys())
    sys.stdout.write(f"{total - found} of {total} tensors are the same\n")
    return int(found > 0)


def _config_from(path: str, hf: str | None) -> str:
    has_own = (Path(path) / "config.json").is_file()
    return hf if hf and not has_own else path


def _logits(asked: argparse.Namespace, words: list[str]) -> int:
    parallel = ParallelConfig(tensor=asked.tensor, pipeline=asked.pipeline, sequence=asked.tensor > 1)
    config = Config(model=ModelConfig(path=asked.paths[0]), parallel=parallel)

    def work() -> int:
        if find_rank(asked.tensor * asked.pipeline) is None:
            return _launch(parallel, asked, words)
        from megatron_rpp.conversion.logits import compare_logits

        return compare_logits(config, asked.paths, LOGITS_ATOL if asked.atol is None else asked.atol)

    return run(TOOL, work, on_gpu=True)


def _launch(parallel: ParallelConfig, asked: argparse.Namespace, words: list[str]) -> int:
    from megatron_rpp.model.checks import check_split
    from megatron_rpp.model.hf_mapping import read_hf_config
    from megatron_rpp.model.load_megatron import is_megatron_directory
    from megatron_rpp.parallel.local_launch import launch_local

    for path in asked.paths:
        check_split(parallel, read_hf_config(path, "DIR"))
    if all(is_megatron_directory(path) for path in asked.paths):
        raise ValueError("--logits needs a Hugging Face directory, for transformers to run; name it first")
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "checkpoint_tools.compare", *words]
        return launch_local(command, asked.tensor * asked.pipeline, Path(logs))


if __name__ == "__main__":
    sys.exit(main())
