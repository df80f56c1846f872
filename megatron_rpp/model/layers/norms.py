"""Norms of the local layer spec, and the norm behind attention or MLP for both specs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rpp import device


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that allows sequence parallelism, which Megatron's `WrappedTorchNorm` refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = 0.0 if self.zero_centered else 1.0
        weight = torch.full((hidden_size,), fill, dtype=config.params_dtype, device=device.current())
        self.weight = torch.nn.Parameter(weight)
        # finalize_model_grads sums the gradients of parameters so marked over the TP ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; any shape [..., hidden_size]."""
        if not self.zero_centered:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # In bfloat16, 1 + weight would round off most of a small weight: Gemma adds and multiplies in float32.
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.eps).type_as(x)


class NormThenAdd(torch.nn.Module):
    """Normalizes what attention or MLP gives, then adds it to the residual.

    Takes the place of Megatron's function `get_bias_dropout_add` in a layer spec. It runs behind the
    row-parallel projection, so its input is summed over the TP ranks already (and split over the sequence
    with sequence parallelism, as at every other norm).
    """

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        """`norm` is the class of the layer spec's other norms."""
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Called as `get_bias_dropout_add` is, for a function (output and bias, residual, dropout) -> sum."""
        return partial(self._add, get_bias_dropout_add(training, fused))

    def _add(
        self, add: Callable[..., Tensor], output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        x, bias = output
        assert bias is None, "a bias would have to be added before the norm"
        return add((self.norm(x), None), residual, dropout)
