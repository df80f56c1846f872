"""Are the ports of the job's servers free on the nodes that start them?"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding, faults, in_words
from megatron_rpp.doctor.job import Job

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FEW = 1000


def measure(ports: Sequence[int]) -> dict[str, Any]:
    """{"taken": {port: why}, "free_range": how many ports the system may choose from}."""
    taken = {port: why for port in ports if (why := _problem(port))}
    try:
        low, high = map(int, _RANGE.read_text().split())
    except (OSError, ValueError):
        return {"taken": taken, "free_range": None}
    return {"taken": taken, "free_range": high - low + 1}


def _problem(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no hindrance
        try:
            probe.bind(("", port))
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return ""


def wanted_ports(config: Config, is_registry: bool) -> list[int]:
    """Of each node that starts servers; none where the system chooses."""
    count = config.slurm.servers_per_node if is_registry else config.rollout.num_servers
    return [config.rollout.port + index for index in range(count)] if config.rollout.port else []


def check(job: Job) -> list[Finding]:
    """On the nodes that start servers."""
    nodes = job.serving_nodes
    if not nodes:
        return [Finding("ports", "ok", "no servers are started: rollout.urls or rollout.urls_file names them")]
    ports = wanted_ports(job.config, job.config.rollout.registry or len(job.places.nodes) > 1)
    return judge(job.ask("ports", "ports.measure", nodes, ports=ports), ports)


def judge(answers: Mapping[str, Mapping[str, Any]], ports: Sequence[int]) -> list[Finding]:
    taken = {}
    few = {}
    for node, answer in answers.items():
        if answer["taken"]:
            taken[node] = in_words([f"port {port}: {why}" for port, why in answer["taken"].items()])
        elif not ports and answer["free_range"] is not None and answer["free_range"] < _FEW:
            few[node] = f"the system chooses from {answer['free_range']} ports alone"
    free = "end what listens there (ss -ltnp shows it), or set rollout.port to another, or to 0 for a free one"
    findings = faults("ports", taken, answers, free, travels=False)
    findings += faults("ports", few, answers, f"widen {_RANGE}", status="warn")
    words = f"{ports[0]}-{ports[-1]} are free" if ports else "the system chooses free ones"
    return findings or [Finding("ports", "ok", words)]
