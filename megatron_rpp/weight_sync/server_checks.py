"""Servers whose checksums cannot be predicted, known by what they say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.rollout.fleet import Server

logger = logging.getLogger(__name__)

_NOT_QUANTIZED = ("", "none", "unquant")


def check_servers(servers: Sequence[Server], dtype: torch.dtype | None, unverified: Sequence[str] = ()) -> None:
    """Raises ConfigError for the first that no sync could verify. Arguments as of `why_unverifiable`.

    Says which servers' quantized weights are compared only as far as `unverified` leaves them.
    """
    for server in servers:
        if reason := why_unverifiable(server, dtype, unverified):
            raise ConfigError(f"the server at {server.url} {reason}")
        if _quantizes(server, dtype):
            logger.warning(
                "the server at %s quantizes its weights (%s): those that weight_sync.unverified does not name will "
                "differ from the trainer's, those that it names are not proven to be the trainer's",
                server.url,
                server.info.quantization,
            )


def why_unverifiable(server: Server, dtype: torch.dtype | None, unverified: Sequence[str] = ()) -> str | None:
    """What of the server prevents it, and what to change; None if nothing does.

    Args:
        dtype: of what it is sent, as StageExport's.
        unverified: weight_sync.unverified; where it names any tensor, those may be quantized ones.
    """
    info = server.info
    for flag, size, what in (
        ("--ep-size", info.ep_size, "expert parallelism (ep_size={}), and maybe an all-to-all backend that implies it"),
        ("--dp-size", info.dp_size, "data parallelism (dp_size={})"),
        ("--pp-size", info.pp_size, "pipeline stages (pp_size={})"),
    ):
        if size != 1:
            return (
                f"runs with {what.format(size)}, for which checksums cannot be predicted; start it without {flag}, "
                "or set weight_sync.verify=off"
            )
    if _quantizes(server, dtype) and not unverified:
        return (
            f"quantizes its weights ({info.quantization}), which could not be compared with the trainer's; set "
            "weight_sync.dtype=float8 if they are FP8 in 128 x 128 blocks, else start it without, name the quantized "
            "tensors in weight_sync.unverified, or set weight_sync.verify=off"
        )
    return None


def _quantizes(server: Server, dtype: torch.dtype | None) -> bool:
    """Whether it makes other values of what it is sent."""
    return server.info.quantization not in _NOT_QUANTIZED and dtype != torch.float8_e4m3fn
