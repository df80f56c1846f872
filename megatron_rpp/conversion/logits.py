"""The logits of directories on a layout of Megatron, against those of transformers. Runs on every rank."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.config.schema import Config, TrainConfig
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logits_head
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import build_model
from megatron_rpp.model.load_megatron import is_megatron_directory
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext

ROWS, WIDTH, SEED = 4, 48, 0


def compare_logits(config: Config, paths: list[str], atol: float) -> int:
    """0 where the float32 logits of every directory agree with transformers' within `atol`, else 1.

    transformers reads the first Hugging Face directory of `paths`, on a few random token rows.
    """
    parallel = bootstrap.initialize(config.parallel, SEED)
    reference = next(path for path in paths if not is_megatron_directory(path))
    verdict = 0
    theirs: Tensor | None = None
    for path in paths:
        tokens, ours = _megatron_logits(replace(config, model=replace(config.model, path=path)), parallel)
        if dist.get_rank() == 0:
            theirs = _transformers_logits(reference, tokens) if theirs is None else theirs
            difference = float((ours - theirs).abs().max())
            verdict |= int(not difference <= atol)
            _tell(config, path, difference, atol)
    dist.barrier()
    bootstrap.shutdown()
    return verdict


def _tell(config: Config, path: str, difference: float, atol: float) -> None:
    layout = f"TP{config.parallel.tensor} x PP{config.parallel.pipeline}"
    word = "agree within" if difference <= atol else "differ by more than"
    sys.stdout.write(f"{path} on {layout}: largest logit difference {difference:.2e}; they {word} {atol:g}\n")
    sys.stdout.flush()


def _megatron_logits(config: Config, parallel: ParallelContext) -> tuple[Tensor, Tensor]:
    """tokens [ROWS, WIDTH] and logits [ROWS, WIDTH, V], on every rank."""
    model = build_model(config, parallel, path=config.model.path)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.hf.vocab_size, (ROWS, WIDTH), generator=generator).to(parallel.device)
    empty = torch.zeros(ROWS, WIDTH, device=parallel.device)
    batch = ExperienceBatch(tokens, empty, empty, empty[:, 0], tokens[:, 0])
    with torch.no_grad():
        found = run_pipeline(
            model, batch, logits_head(model), train=TrainConfig(micro_batch_size=ROWS), forward_only=True
        )
    return tokens, found["logits"]


def _transformers_logits(path: str, tokens: Tensor) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model.to(device=tokens.device)(tokens).logits
