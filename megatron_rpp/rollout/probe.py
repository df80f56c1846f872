"""Asking servers how they are: quickly, thoroughly, and many at once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.protocol import RolloutError

T = TypeVar("T")
R = TypeVar("R")
_CONNECT_S = 2.0
_INFO_S = 10.0


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself."""

    tp_size: int
    device: str  # cpu | cuda
    ep_size: int = 1  # of its experts
    dp_size: int = 1  # copies of the model, or of its attention
    pp_size: int = 1
    quantization: str = ""  # of its weights, such as fp8, where it says so


def examine(url: str, timeout_s: float) -> ServerInfo | str:
    """What a server that generates says of itself, or why it is not healthy, after `timeout_s` and some seconds."""
    try:
        get_json(url, "health", timeout_s)
        info = get_json(url, "server_info", min(timeout_s, _INFO_S))
        return ServerInfo(
            tp_size=int(str(info["tp_size"])),
            device=str(info["device"]),
            ep_size=int(str(info.get("ep_size") or 1)),
            dp_size=max(int(str(info.get(key) or 1)) for key in ("dp_size", "attn_dp_size")),
            pp_size=int(str(info.get("pp_size") or 1)),
            quantization=str(info.get("quantization") or ""),
        )
    except RolloutError as error:
        return str(error)
    except (KeyError, ValueError) as error:
        return f"{url}/server_info: no tp_size and device in the reply; is this an SGLang server? ({error!r})"


def accepts_connections(url: str) -> bool:
    """Somebody listens there; also true of a stopped process."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def at_once(ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`ask` of every item, each in its own thread; answers in the order of `items`."""
    with ThreadPoolExecutor(max(len(items), 1)) as pool:
        return list(pool.map(ask, items))
