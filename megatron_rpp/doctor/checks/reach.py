"""Can every node open a connection to every other, at the address that training would use?"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_rpp.doctor.finding import Finding, accuse, in_words
from megatron_rpp.doctor.job import Job
from megatron_rpp.parallel.environment import node_name

LIMIT_S = 5.0
_PEERS = 32  # that a node tries; in a larger job, the next ones in a ring
_listening: list[socket.socket] = []  # of this probe, until it ends


def listen() -> dict[str, Any]:
    """{"address", "port"} that others can try, or {"error"}; the system takes their connections, nobody accepts."""
    from megatron_rpp.parallel.interfaces import reachable_address

    try:
        address = reachable_address(node_name())
    except ValueError as error:
        return {"error": str(error)}
    _listening.append(socket.create_server(("", 0), backlog=4 * _PEERS))
    return {"address": address, "port": _listening[-1].getsockname()[1]}


def connect(peers: Mapping[str, Mapping[str, tuple[str, int]]], limit_s: float) -> dict[str, str]:
    """{node: why it cannot be reached}. peers: of each asking node, {node: (address, port)}."""
    mine = peers[node_name()]
    with ThreadPoolExecutor(max_workers=_PEERS) as pool:
        results = pool.map(lambda place: _try(place[0], place[1], limit_s), mine.values())
    return {node: error for node, error in zip(mine, results, strict=True) if error}


def _try(address: str, port: int, limit_s: float) -> str:
    try:
        socket.create_connection((address, port), timeout=limit_s).close()
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
    return ""


def check(job: Job) -> list[Finding]:
    """Leaves the addresses for the check of the network."""
    if len(job.nodes) < 2:
        return [Finding("reach", "ok", "one node")]
    told = job.ask("reach", "reach.listen", job.nodes)
    places = {node: (place["address"], place["port"]) for node, place in told.items() if "error" not in place}
    job.addresses = {node: address for node, (address, _) in places.items()}
    remedy = "give the node's own name an address that others reach: DNS or /etc/hosts"
    findings = [
        Finding("reach", "fail", place["error"], remedy, node, True) for node, place in told.items() if "error" in place
    ]
    peers = {node: _ring(node, places) for node in places}
    return findings + judge(job.ask("reach", "reach.connect", list(places), peers=peers, limit_s=LIMIT_S))


def _ring(node: str, places: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    order = list(places)
    start = order.index(node) + 1
    return {peer: places[peer] for peer in (order[start:] + order[: start - 1])[:_PEERS]}


def judge(answers: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """answers: of each node, {other node: why it cannot be reached}."""
    wrong = {(asker, target): error for asker, errors in answers.items() for target, error in errors.items()}
    findings = []
    for node, others in accuse(list(wrong), answers).items():
        asker, target = (node, others[0]) if (node, others[0]) in wrong else (others[0], node)
        found = f"{asker} cannot connect to {target} at {wrong[asker, target]}"
        if len(others) > 1:
            found += f"; the same with {in_words(others[1:])}"
        remedy = f"open the ports between the nodes (firewall, subnet, cable): ping {target} from {asker}, then nc -vz"
        findings.append(Finding("reach", "fail", found, remedy, node, True))
    return findings or [Finding("reach", "ok", f"each of {len(answers)} nodes connects to the others")]
