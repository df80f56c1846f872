"""Names that Megatron-Core (0.16) leaves wrong where Transformer Engine is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


def correct_megatron() -> None:
    """Say in Megatron's modules that there is no Transformer Engine. Idempotent; does nothing where there is one.

    `moe_utils.router_gating_linear` reads `te_general_gemm`, which a failed import leaves undefined;
    `multi_latent_attention.HAVE_TE` is True, because the wrappers it imports exist without the engine;
    `random.CheckpointWithoutOutput`, which norms are recomputed by, takes its default fp8=False for a yes.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
    random.FP8GlobalStateManager = _NoFp8
    random.activation_recompute_forward = random.fp8_autocast = _nothing


class _NoFp8:
    """In place of Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextmanager
def _nothing(**unused: object) -> Iterator[None]:
    yield
