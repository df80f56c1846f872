"""Which of this host's network interfaces other hosts reach it by. IPv4; imports no torch."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import MutableMapping

from megatron_rpp.config.errors import ConfigError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """This host's interfaces that have an address: {name: its first IPv4 address}."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:  # it has none
                continue
    return found


def resolve(name: str, host: str, advice: str) -> str:
    """An address of `name`, one that is not loopback if there is any. ConfigError names `host`, where it was asked."""
    try:
        answers = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host {host}: the name {name} does not resolve ({error.strerror}); {advice}") from error
    addresses = [str(answer[4][0]) for answer in answers]
    return next((address for address in addresses if not is_loopback(address)), addresses[0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def reachable_address(host: str) -> str:
    """The address that other hosts reach this one by. ConfigError names `host`, which is this one, and a remedy.

    That of the interface in GLOO_SOCKET_IFNAME, where the user has set it; else what the host's own name stands for.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    found = interfaces()
    if wanted:
        if wanted not in found:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={wanted} must be an interface of host {host}: {', '.join(sorted(found))}"
            )
        return found[wanted]
    name = socket.gethostname()
    advice = f"add {name} with its address to DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME to the nodes' interface"
    address = resolve(name, host, advice)
    if is_loopback(address):
        raise ConfigError(
            f"host {host}: its name {name} stands for {address}, which other hosts cannot reach; {advice}"
        )
    if address not in found.values() and not _is_own(address):
        raise ConfigError(f"host {host}: its name {name} stands for {address}, which is not its own; {advice}")
    return address


def address_towards(host: str, port: int) -> str:
    """The address of this host on the route to `host`, IPv6 too. Raises OSError where there is none."""
    family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connects nothing, only picks a route
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_to(address: str) -> str | None:
    """The interface that traffic to `address` leaves by (for an own address, its own); None where there is none."""
    try:
        source = address_towards(address, 9)
    except OSError:
        return None
    return next((name for name, own in interfaces().items() if own == source), None)


def choose_interfaces(address: str, env: MutableMapping[str, str] = os.environ) -> str | None:
    """Have gloo and NCCL use the interface that leads to rank 0's `address`, where the user has not chosen.

    gloo would take what the host's own name stands for, often loopback; NCCL the first that looks fast.
    Returns the interface's name, None where the job stays on loopback.
    """
    name = None if is_loopback(address) else interface_to(address)
    if name is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=" it would be a prefix
    return name


def _is_own(address: str) -> bool:
    """Whether this host has `address`, be it an interface's second."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
