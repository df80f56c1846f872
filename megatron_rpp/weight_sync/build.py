"""The synced rollout engine of a configuration."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from megatron_rpp import device
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config
from megatron_rpp.model.build import Model
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.server_weights import server_dtype, why_not_float8, why_other_values
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.journal import Journal
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.broadcast import BroadcastTransport
from megatron_rpp.weight_sync.delta_transport import DeltaTransport
from megatron_rpp.weight_sync.disk import DiskTransport
from megatron_rpp.weight_sync.ipc import IpcTransport
from megatron_rpp.weight_sync.server_layout import ServerLayout
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from megatron_rpp.weight_sync.transport import Transport

logger = logging.getLogger(__name__)

_UNVERIFIED = (
    "weight_sync.verify=off: no checksum is compared, so that servers may sample from other weights than the "
    "trainer's; nothing but the parity monitor would tell"
)
_FLOAT32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"  # of Transformer Engine


def check_weight_sync(config: Config, hf: HFConfig) -> None:
    """What can be told before servers and models are there. Raises ConfigError."""
    _check_float8(config, hf)
    if config.weight_sync.verify == "off":
        logger.warning(_UNVERIFIED)
    else:
        ServerLayout(hf)
    if "ipc" in config.weight_sync.transports and not device.has_cuda():
        raise ConfigError("weight_sync.transports=ipc needs servers on the trainer's GPUs; choose broadcast or disk")


def build_engine(
    config: Config, policy: Model, fleet: ServerFleet | None, client: SGLangClient, journal: Journal | None = None
) -> SyncedRolloutEngine:
    """fleet: on rank 0. journal: on replica leaders, or nowhere."""
    transports = [build_transport(name, config) for name in config.weight_sync.transports]
    return SyncedRolloutEngine(policy, fleet, client, transports, config, export_dtype(config, policy.hf), journal)


def export_dtype(config: Config, hf: HFConfig) -> torch.dtype | None:
    """What weights are converted to on their way to the servers; None: they stay as they are."""
    name = server_dtype(config, hf)
    if name == "float8":
        return torch.float8_e4m3fn
    return None if config.weight_sync.dtype == "auto" else device.dtype(name)


def _check_float8(config: Config, hf: HFConfig) -> None:
    """Says where FP8 servers would not compute with the trainer's values, or auto has none for that. ConfigError."""
    if config.fp8.recipe == "blockwise" and os.environ.get(_FLOAT32_SCALES, "0") != "0":
        raise ConfigError(
            f"fp8.recipe=blockwise must go without {_FLOAT32_SCALES}: servers get powers of two as scales"
        )
    chosen = config.weight_sync.dtype
    reason = (why_not_float8 if chosen == "auto" else why_other_values)(config, hf)
    if reason is not None and chosen in ("auto", "float8"):
        what = f"are {server_dtype(config, hf)}" if chosen == "auto" else "differ from the trainer's"
        logger.info("weight_sync.dtype=%s: the servers' weights %s, since %s", chosen, what, reason)


def build_transport(name: str, config: Config) -> Transport:
    """One of weight_sync.transports."""
    sync = config.weight_sync
    bucket_bytes = sync.bucket_mb * 2**20
    if name == "disk":
        folder = Path(sync.disk_path or Path(config.run.dir) / "weights").resolve()
        seen_as = sync.disk_path_on_servers or str(folder)
        return DiskTransport(folder=folder, seen_as=seen_as, source=config.model.path, mtp=config.model.mtp)
    broadcast = BroadcastTransport(bucket_bytes=bucket_bytes)
    if name == "delta":
        return DeltaTransport(broadcast, bucket_bytes=bucket_bytes, full_every=sync.delta_full_every)
    if name == "ipc":
        return IpcTransport(bucket_bytes=bucket_bytes)
    return broadcast
