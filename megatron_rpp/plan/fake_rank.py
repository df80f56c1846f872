"""One process as a rank of a job that is not there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.environment import single_place

META = torch.device("meta")


@contextmanager
def fake_rank(config: ParallelConfig) -> Iterator[ParallelContext]:
    """Rank 0 of a job of `config`'s layout; its collectives do nothing, and its tensors have no memory.

    Raises ValueError in a process that is a rank of a real job.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise ValueError("a plan is made by a process of its own, outside of a job: run `rpp plan`")
    store = FakeStore()
    world_size = config.world_size
    dist.init_process_group("fake", store=store, rank=0, world_size=world_size)
    try:
        parallel = bootstrap.megatron_groups(config, 0, store, replace(single_place(), world_size=world_size))
        with device.without_memory(), AlwaysMeta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron tells of every optional package that is not installed
            yield parallel
    finally:
        bootstrap.shutdown()


class AlwaysMeta(TorchFunctionMode):
    """Nothing is made on, or moved to, a device with memory: Megatron names the current CUDA device in many places."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() or kwargs.get("device") is not None:
            kwargs["device"] = META
        name = getattr(func, "__name__", "")
        if name in ("cpu", "cuda"):
            return args[0]
        if name == "to":
            args = tuple(META if _is_device(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_device(argument: Any) -> bool:
    return isinstance(argument, torch.device | str)
