"""Which processes may have torch's allocator use expandable segments of GPU memory.

They spare a trainer the gaps that tensors of ever other sizes leave behind, and with them cached memory goes back to
the GPU whole. But what lies in them can be sent by CUDA IPC only where the receiver may take the sender's file
handles, which containers forbid (pytorch/pytorch#130330, NVIDIA-NeMo/RL#3782); SGLang's memory saver cannot release
it (fzyzcjy/torch_memory_saver#24); and with CUDA graphs NCCL must not register buffers in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch reads both, the second since 2.9."""
_OPTION = "expandable_segments"
_REGISTERS = "NCCL_GRAPH_REGISTER"
"""Megatron asks for 0, too, where it makes graphs with them (transformer/cuda_graphs.py)."""


def check_allocator(config: Config, environment: Mapping[str, str], *, syncs: bool = True) -> None:
    """Of the trainer's own `environment`. Raises ConfigError where it contradicts weight_sync.transports or
    train.cuda_graphs.

    syncs: whether weights are sent to servers.
    """
    for name in (name for name in VARIABLES if _is_on(environment.get(name, ""))):
        must = f"{name}={environment[name]} must go without {_OPTION}"
        if syncs and "ipc" in config.weight_sync.transports:
            raise ConfigError(
                f"{must}: weight_sync.transports=ipc cannot send what lies in them; unset it, or choose broadcast"
            )
        if config.train.cuda_graphs and environment.get(_REGISTERS) != "0":
            raise ConfigError(
                f"{must}: with train.cuda_graphs=true NCCL would register what lies in them; unset it, or set "
                f"{_REGISTERS}=0"
            )


def for_server(environment: Mapping[str, str], rollout: RolloutConfig) -> dict[str, str]:
    """`environment` as an SGLang server may have it: without them where it is to release its memory."""
    found = dict(environment)
    for name in VARIABLES:
        if rollout.release_memory and _is_on(found.get(name, "")):
            kept = ",".join(option for option in found.pop(name).split(",") if not _is_on(option))
            found |= {name: kept} if kept else {}
    return found


def _is_on(settings: str) -> bool:
    """As torch reads "a:1,expandable_segments:True"."""
    pairs = (option.partition(":") for option in settings.split(","))
    return any(name.strip() == _OPTION and value.strip().lower() == "true" for name, _, value in pairs)
