"""Servers whose checksums cannot be predicted, known by what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.rollout.fleet import Server

_NOT_QUANTIZED = ("", "none", "unquant")


def check_servers(servers: Sequence[Server], dtype: torch.dtype | None) -> None:
    """Raises ConfigError for the first that no sync could verify. dtype: of what it is sent, as StageExport's."""
    for server in servers:
        if reason := why_unverifiable(server):
            raise ConfigError(f"the server at {server.url} {reason}")
        if server.quantization not in _NOT_QUANTIZED and dtype != torch.float8_e4m3fn:
            raise ConfigError(
                f"the server at {server.url} quantizes its weights ({server.quantization}), which could not be "
                "compared with the trainer's; set weight_sync.dtype=float8 if they are FP8 in 128 x 128 blocks, else "
                "start it without, or set weight_sync.verify=off"
            )


def why_unverifiable(server: Server) -> str | None:
    """What of the server's layout prevents it, and what to change; None if nothing does."""
    if server.ep_size == 1:
        return None
    return (
        f"runs with expert parallelism (ep_size={server.ep_size}), for which checksums cannot be predicted; start it "
        "without --ep-size and the all-to-all backends that imply it, or set weight_sync.verify=off"
    )
