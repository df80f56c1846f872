"""Per-sample seeds on CPU and a quick start, through SGLang's plugin hook (entry point group `sglang.srt.plugins`).

SGLang reads `sampling_params.sampling_seed` only under `--enable-deterministic-inference`, which on
CPU lacks three things: leave to use the torch_native attention, a batch-invariant mode (CUDA kernels;
without it a sample can in rare cases depend on the batch, by float rounding), and the hash of seeds.
"""

from __future__ import annotations

import gc
import multiprocessing
from typing import Any


def register() -> None:
    """Called by SGLang once in each of its processes."""
    from sglang.srt.arg_groups.choices import (
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", _no_cuda_kernels, HookType.REPLACE
    )
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork_workers, HookType.AFTER)
    from rpp_sglang_cpu import seeds

    seeds.define()


def _no_cuda_kernels(enable_bmm: bool = True) -> None:
    """In place of `enable_batch_invariant_mode`, which raises where there is no accelerator."""


def _fork_workers(result: Any, *args: Any, **kwargs: Any) -> Any:
    """After SGLang has chosen to spawn: workers that are forked need not import everything again, 8 s each.

    A CPU server has no CUDA context that a fork would break, and starts its threads later. What has been imported is
    left out of garbage collections: `flush_cache` makes a full one, which took 0.4 s of every weight sync.
    """
    multiprocessing.set_start_method("fork", force=True)
    gc.freeze()
    return result
