"""Addresses of servers, and of this host on the way to them."""

from __future__ import annotations

import socket


def base_url(host: str, port: int) -> str:
    """http://host:port, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def address_towards(host: str, port: int) -> str:
    """The address of this host on the route to `host`. Raises OSError where there is none."""
    family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connects nothing, only picks a route
        probe.connect(target)
        return str(probe.getsockname()[0])
