"""What of the trainer leaves the GPU while others need the room (memory.offload).

    sampling, weight sync     policy
    scoring                   policy, reference
    training                  policy, gradients, optimizer

While servers sample, FP8 copies of the policy's weights are dropped with the rest, but where CUDA graphs hold them.
Between these each part is where it was left. Parts that memory.offload does not name never move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

from megatron_rpp import device
from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.device.memory import wait_for_device
from megatron_rpp.engine.host_copy import BLOCK_BYTES, HostCopy, storages_of
from megatron_rpp.engine.optimizer import Optimizer, chained_parts
from megatron_rpp.model.build import Model


class Offload:
    """`put_away()` before servers on the same GPUs take memory; `scoring()` and `training()` around those phases.

    An exception inside leaves everything where it is. Not a collective.
    """

    def __init__(
        self,
        config: MemoryConfig,
        policy: Model,
        optimizer: Optimizer,
        reference: Model | None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._policy, self._optimizer, self._reference = policy, optimizer, reference
        self._names = frozenset(config.offload)
        self._states, self._weights = HostCopy(block_bytes), HostCopy(block_bytes)
        self._dropped: list[tuple[UntypedStorage, int]] = []  # gradient buffers, with the bytes they had

    @property
    def host_bytes(self) -> int:
        """On the host now, of this rank."""
        return self._states.nbytes + self._weights.nbytes

    @property
    def moves_optimizer(self) -> bool:
        """Whether a checkpoint needs room on the GPU first. The same on all ranks."""
        return "optimizer" in self._names

    def put_away(self) -> None:
        """All that is to be off the GPU while servers sample."""
        if not self._names:
            return
        self._put_training_away()
        self._put_reference_away()
        if self._policy.config.cuda_graph_impl == "none":  # graphs are replayed on the copies that they have met
            _drop_fp8_copies(self._policy)
        device.free_cached_memory()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, the reference is there."""
        self._weights.give_back()
        yield
        self._put_reference_away()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, gradient buffers and the optimizer are there. Then everything is away, as for sampling."""
        self._bring_training()
        yield
        self.put_away()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, the optimizer is there, wherever it was; then it is there again."""
        was_away = self._states.nbytes > 0
        self._states.give_back()
        yield
        if was_away:
            self.put_away()

    def _bring_training(self) -> None:
        while self._dropped:
            storage, size = self._dropped[-1]
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
            self._dropped.pop()
        self._states.give_back()

    def _put_training_away(self) -> None:
        own = {storage._cdata for storage in storages_of(_weights(self._policy))}
        if "gradients" in self._names and not self._dropped:
            wait_for_device()  # the last step may still read them, on a stream of its own
            for storage in storages_of(_gradients(self._policy)):
                if storage._cdata not in own:  # Megatron may gather parameters in the gradients' buffer
                    self._dropped.append((storage, storage.nbytes()))
                    storage.resize_(0)
        if "optimizer" in self._names and not self._states.nbytes:
            tensors = _optimizer_tensors(self._optimizer)
            self._states.take(x for x in tensors if x.untyped_storage()._cdata not in own)

    def _put_reference_away(self) -> None:
        if "reference" in self._names and self._reference is not None and not self._weights.nbytes:
            _drop_fp8_copies(self._reference)
            self._weights.take(_weights(self._reference))


def _drop_fp8_copies(model: Model) -> None:
    """Transformer Engine's FP8 copies of weights; it makes them anew where they are missing."""
    for chunk in model.chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def _weights(model: Model) -> Iterator[Tensor]:
    """Parameters and buffers; with DDP also the buffers that its parameters are views of."""
    for chunk in model.chunks:
        bare = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        for tensor in (*bare.parameters(), *bare.buffers()):
            yield from _parts(tensor)
        yield from (buffer.param_data for buffer in _ddp_buffers(chunk) if buffer.param_data is not None)


def _gradients(model: Model) -> Iterator[Tensor]:
    for chunk in model.chunks:
        yield from (buffer.grad_data for buffer in _ddp_buffers(chunk))


def _ddp_buffers(chunk: torch.nn.Module) -> list[Any]:
    """Megatron's `_ParamAndGradBuffer`s, those of experts too; none of a model without DDP."""
    if not isinstance(chunk, DistributedDataParallel):
        return []
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _parts(tensor: Tensor) -> list[Tensor]:
    """What holds its bytes: of Transformer Engine's quantized tensors, which have no storage, data and scales."""
    metadata = getattr(tensor, "get_metadata", None)
    return [tensor] if metadata is None else [part for part in metadata().values() if isinstance(part, Tensor)]


def _optimizer_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Main weights and moments. Where the model is float32 the main weights are its own parameters."""
    for part in chained_parts(optimizer.megatron):
        adam = part.optimizer
        if adam is None:  # of a stage without experts
            continue
        for group in adam.param_groups:
            yield from group["params"]
        for state in adam.state.values():
            # torch's AdamW has a step of no dimension, in host memory already.
            yield from (x for x in state.values() if isinstance(x, Tensor) and x.dim() > 0)
