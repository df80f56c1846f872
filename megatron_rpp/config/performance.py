"""Sections that make a step cheaper or show what it costs. None of them changes the objective."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fp8Config:
    """Matrix products in FP8, with Transformer Engine; the rest stays in bfloat16. Policy and reference alike."""

    recipe: str = "none"
    """Scaling: none, delayed, tensorwise (current scaling), blockwise (128 x 128, Hopper) or mxfp8 (Blackwell)."""
    format: str = "hybrid"
    """hybrid (E4M3 forward, E5M2 gradients) or e4m3 (both)."""
    params: bool = False
    """Hold matrices in FP8 alone (tensorwise, blockwise); the distributed optimizer keeps float32 main weights."""
    bf16_first_layers: int = 0
    """Layers at the start of the model that stay in bfloat16."""
    bf16_last_layers: int = 0
    """Layers at the end of the model that stay in bfloat16."""
    amax_history: int = 1024
    """Passes whose largest magnitude sets the scale of recipe delayed."""

    @property
    def is_on(self) -> bool:
        """Whether anything is computed in FP8."""
        return self.recipe != "none"


@dataclass(frozen=True)
class MemoryConfig:
    """What is given up, in time, for the trainer's memory."""

    offload: tuple[str, ...] = ()
    """Moved to host memory while it is not needed: optimizer (state), gradients (dropped), reference (weights)."""
    recompute: str = "none"
    """Activations computed again in the backward: none, selective (of recompute_modules) or full (whole layers)."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """For selective, in Megatron's names: core_attn, mlp, moe, moe_act, layernorm, mla_up_proj, shared_experts."""


@dataclass(frozen=True)
class ProfileConfig:
    """What is recorded of chosen steps, in RUN_DIR/profile."""

    steps: tuple[int, ...] = ()
    """Rollout batches that are recorded; empty: none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that record."""
    record: tuple[str, ...] = ("trace",)
    """trace (torch profiler, for chrome://tracing or Perfetto), memory (CUDA snapshot) or nvtx (ranges for nsys)."""
