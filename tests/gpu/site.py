"""Where a body runs, and how large: one process that is a whole job, on its GPU or on CPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rpp import device
from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext

VOCAB = 128


@dataclass(frozen=True)
class Site:
    """One rank that is a job of its own."""

    parallel: ParallelContext
    folder: Path  # for files of this body alone
    is_tiny: bool  # on CPU: for typos, not for figures

    @property
    def layer_spec(self) -> str:
        """Transformer Engine's, where there is a GPU: without it the test fails, and is not skipped."""
        return "local" if self.is_tiny else "te"

    def config(self, path: Path, **model: Any) -> Config:
        """Of a model in `path`, bfloat16, packed microbatches, and a high learning rate without warm-up."""
        settings = {"dtype": "bfloat16", "layer_spec": self.layer_spec, "vocab_divisor": VOCAB, **model}
        return Config(
            model=ModelConfig(path=str(path), **settings),
            train=TrainConfig(batch_size=8, micro_batch_tokens=64 if self.is_tiny else 2048),
            optimizer=OptimizerConfig(lr=1e-3),
        )

    def llama(self, name: str = "llama") -> Path:
        """A random Llama whose dimensions are multiples of 128, as 128 x 128 blocks want them; on CPU a small one."""
        path = self.folder / name
        if not path.exists():
            torch.manual_seed(0)
            LlamaForCausalLM(llama_config(self.is_tiny)).save_pretrained(path)
        return path

    def batch(self, rows: int = 8) -> ExperienceBatch:
        """Random rows of different lengths, half prompt and half response."""
        longest = 24 if self.is_tiny else 512
        g = torch.Generator().manual_seed(1)
        lengths = torch.randint(longest // 4, longest + 1, (rows, 1), generator=g)
        columns = torch.arange(int(lengths.max()))
        here = self.parallel.device
        is_token = columns < lengths
        return ExperienceBatch(
            tokens=(torch.randint(2, VOCAB, is_token.shape, generator=g) * is_token).to(here),
            loss_mask=(is_token & (columns >= lengths // 2)).float().to(here),
            rollout_logprobs=torch.zeros(is_token.shape, device=here),
            rewards=torch.rand(rows, generator=g, dtype=torch.float64).to(here),
            group_ids=(torch.arange(rows) // 2).to(here),
        )


def llama_config(is_tiny: bool) -> LlamaConfig:
    hidden, ffn, layers, heads = (64, 128, 2, 4) if is_tiny else (512, 1024, 4, 8)
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.06,  # large enough that every layer matters
        dtype="float32",
    )


def with_fp8(config: Config, recipe: str, **fp8: Any) -> Config:
    """`config` with everything in FP8, or as it is for `none`."""
    return replace(config, fp8=Fp8Config(recipe=recipe, **fp8))


@contextmanager
def open_site(folder: Path, *, is_tiny: bool) -> Iterator[Site]:
    """Joins a job of one rank; what bodies leave on the GPU is freed by `clean`."""
    parallel = bootstrap.initialize(ParallelConfig(), seed=0)
    try:
        yield Site(parallel, folder, is_tiny)
    finally:
        bootstrap.shutdown()


def clean() -> None:
    """Leave no trace of a body: torch compiles a kernel for 8 kinds of arguments, over all tests, and then raises."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    free()


def free() -> None:
    """The memory of what is no longer used."""
    gc.collect()
    device.free_cached_memory()
