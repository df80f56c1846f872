"""A pipeline stage's tensors as someone else is to hold them: under Hugging Face names, in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from torch import Tensor

from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import empty_hf_tensors, hf_tensors
from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX, is_quantized, quantize, scale_shape
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.parallel.collectives import GatherShards, gather_shards

NamedTensor = tuple[str, Tensor]


@dataclass(frozen=True)
class StageExport:
    """How `model` is exported. `tensors` may be run again and again.

    dtype: of all but what keeps its own (a router's selection bias); None: as the model holds it;
    float8_e4m3fn: the projections in 128 x 128 blocks beside their scales, the rest in bfloat16. A model that is
    trained in such blocks has theirs, and the layers that it keeps in bfloat16 stay so.
    watch: sees each tensor before anyone else.
    """

    model: Model
    dtype: torch.dtype | None = None
    gather: GatherShards = gather_shards
    watch: Callable[[str, Tensor], None] | None = None

    @property
    def is_fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    @property
    def main_dtype(self) -> torch.dtype:
        """What config.json calls the dtype: that of the tensors that are not FP8."""
        if self.dtype is None:
            return self.model.config.params_dtype
        return torch.bfloat16 if self.is_fp8 else self.dtype

    @property
    def bf16_layers(self) -> list[int]:
        """Layers that training in FP8 leaves out."""
        return [i for i in range(self.model.hf.num_layers) if is_first_last_bf16_layer(self.model.config, i)]

    def tensors(self) -> Iterator[NamedTensor]:
        """Every tensor of the stage. A collective as `hf_tensors` is: run it to its end.

        An error of conversion or of `watch` is raised when all is gathered, since the other ranks go on.
        """
        failed: Exception | None = None
        for name, whole in hf_tensors(self.model, gather=self.gather):
            if failed is None:
                try:
                    converted = self._converted(name, whole)
                    for each in converted if self.watch is not None else ():
                        self.watch(*each)  # type: ignore[misc] # it is not None
                except Exception as error:
                    failed = error
                else:
                    del whole  # what has been sent is let go before the next gather
                    while converted:
                        yield converted.pop(0)
        if failed is not None:
            raise failed

    def empty(self) -> Iterator[NamedTensor]:
        """What `tensors` will give, on the meta device; no collective."""
        for name, tensor in empty_hf_tensors(self.model):
            yield from self._converted(name, tensor)

    def _converted(self, name: str, tensor: Tensor) -> list[NamedTensor]:
        if self.is_fp8 and is_quantized(name, tensor.shape, self.bf16_layers):
            config = self.model.config
            is_trained_so = bool(config.fp8) and config.fp8_recipe == "blockwise"
            pair = _quantized(name, tensor, power_of_two=is_trained_so)
            return list(zip((name, name + SCALE_SUFFIX), pair, strict=True))
        if self.dtype is None or family_of(self.model.hf).keeps_dtype(name):
            return [(name, tensor)]
        return [(name, tensor.to(self.main_dtype))]


def _quantized(name: str, tensor: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if tensor.is_meta:
        return tensor.to(torch.float8_e4m3fn), tensor.new_empty(scale_shape(tensor.shape), dtype=torch.float32)
    try:
        return quantize(tensor, power_of_two=power_of_two)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
