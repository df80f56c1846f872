"""An SGLang server for a run, as its configuration wants it."""

from __future__ import annotations

from pathlib import Path

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.model.server_weights import server_weights
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from megatron_rpp.rollout.server_command import HOST
from megatron_rpp.rollout.sglang_server import SGLangServer


def run_server(config: Config, index: int, log_name: str, *, base_gpu: int, host: str = HOST) -> SGLangServer:
    """Server `index` of this host, not started.

    log_name: its file in RUN_DIR/logs. base_gpu: the first of its GPUs. host: the address that it listens on.
    """
    rollout, (dtype, bf16_layers) = config.rollout, server_weights(config)
    return SGLangServer(
        model_path=config.model.path,
        rollout=rollout,
        dtype=dtype,
        bf16_layers=bf16_layers,
        log_path=Path(config.run.dir) / "logs" / log_name,
        host=host,
        device="cuda" if device.has_cuda() else "cpu",
        trust_remote_code=config.model.trust_remote_code,
        base_gpu=base_gpu,
        weight_loader=LOADER if "delta" in config.weight_sync.transports else None,
        port=rollout.port and rollout.port + index,
    )
