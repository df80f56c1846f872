"""Do transformers and Megatron compute the same logits from one Hugging Face directory?

    python -m checkpoint_tools.compare_logits MODEL_DIR [--tensor N] [--pipeline N] [--atol 1e-3]

Runs both in float32 on a few random token rows. Prints the largest difference; exit code 1 where it
exceeds --atol, 2 where the layout does not fit the model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.models import check_split, read_model_config
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.parallel.local_launch import USER_ERROR, launch_local

ROWS, WIDTH, SEED = 4, 48, 0


def main(argv: Sequence[str] | None = None) -> int:
    """Launch the ranks, or be one of them."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    config = Config(
        model=ModelConfig(path=arguments.model),
        parallel=ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline),
    )
    if "WORLD_SIZE" in os.environ:
        return _compare(config, arguments.atol)
    try:
        check_split(config.parallel, read_model_config("MODEL_DIR", arguments.model))
    except ConfigError as error:
        sys.stderr.write(f"compare_logits: error: {error}\n")
        return USER_ERROR
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "checkpoint_tools.compare_logits", *words]
        return launch_local(command, arguments.tensor * arguments.pipeline, Path(logs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compare_logits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--atol", type=float, default=1e-3, help="largest difference that is accepted")
    return parser


def _compare(config: Config, atol: float) -> int:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from megatron_rpp.engine.pipeline import run_pipeline
    from megatron_rpp.experience.types import ExperienceBatch
    from megatron_rpp.model.build import build_model
    from megatron_rpp.parallel import bootstrap
    from megatron_rpp.parallel.collectives import gather_shards

    parallel = bootstrap.initialize(config.parallel, SEED)
    model = build_model(config, parallel, path=config.model.path)

    def whole_logits(logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        whole = torch.cat(gather_shards(logits, parallel.tp_group), dim=-1)[..., : model.hf.vocab_size]
        return logits.new_zeros(()), {"logits": whole}

    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.hf.vocab_size, (ROWS, WIDTH), generator=generator).to(parallel.device)
    empty = torch.zeros(ROWS, WIDTH, device=parallel.device)
    batch = ExperienceBatch(tokens, empty, empty, empty[:, 0], tokens[:, 0])
    with torch.no_grad():
        ours = run_pipeline(model, batch, whole_logits, micro_batch_size=ROWS, forward_only=True)["logits"]
    verdict = 0
    if dist.get_rank() == 0:
        difference = float((ours - _transformers_logits(config.model.path, tokens)).abs().max())
        verdict = int(difference > atol)
        layout = f"TP{config.parallel.tensor} x PP{config.parallel.pipeline}"
        word = "differ by more than" if verdict else "agree within"
        sys.stdout.write(f"{layout}: largest logit difference {difference:.2e}; they {word} {atol:g}\n")
        sys.stdout.flush()
    dist.barrier()
    bootstrap.shutdown()
    return verdict


def _transformers_logits(path: str, tokens: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


if __name__ == "__main__":
    sys.exit(main())
