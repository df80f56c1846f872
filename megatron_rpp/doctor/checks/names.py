"""Does every node find every other by its host name?"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rpp.doctor.finding import Finding, accuse, in_words
from megatron_rpp.doctor.job import Job

LIMIT_S = 8.0  # a resolver that does not answer costs getaddrinfo 30 s and more
SLOW_S = 2.0
Answer = Mapping[str, Mapping[str, Any]]  # of one node: {host name: {"addresses", "error", "seconds"}}


def measure(names: Sequence[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Look all of `names` up at once, as getent does."""
    found: dict[str, dict[str, Any]] = {}
    threads = [threading.Thread(target=_resolve, args=(name, found), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = {"addresses": [], "error": f"the resolver gave no answer within {limit_s:g} s", "seconds": limit_s}
    return {name: found.get(name, late) for name in names}


def _resolve(name: str, found: dict[str, dict[str, Any]]) -> None:
    start = time.monotonic()
    try:
        rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        addresses, error = sorted({str(row[4][0]) for row in rows}), None
    except OSError as failure:
        addresses, error = [], failure.strerror or str(failure)
    found[name] = {"addresses": addresses, "error": error, "seconds": time.monotonic() - start}


def check(job: Job) -> list[Finding]:
    """Every pair of nodes."""
    names = sorted(set(job.hosts[node] for node in job.nodes))
    return judge(job.ask("names", "names.measure", job.nodes, names=names, limit_s=LIMIT_S), job.hosts)


def judge(answers: Mapping[str, Answer], hosts: Mapping[str, str]) -> list[Finding]:
    """hosts: the host name that each node has for itself."""
    wrong = {
        (asker, target): problem
        for asker, answer in answers.items()
        for target in answers
        if (problem := _problem(answer[hosts[target]]))
    }
    if len(answers) == 1:  # nobody else needs the name
        return [_lone(*pair, wrong.get(pair, "")) for pair in [(node, hosts[node]) for node in answers]]
    findings = []
    for node, others in accuse(list(wrong), answers).items():
        first = (node, others[0]) if (node, others[0]) in wrong else (others[0], node)
        asker, target = first
        found = f"{asker} cannot use the name {hosts[target]}: {wrong[first]}"
        if len(others) > 1:
            found += f"; the same with {in_words(others[1:])}"
        remedy = f"make `getent hosts {hosts[target]}` on {asker} give the address that others reach: DNS or /etc/hosts"
        findings.append(Finding("names", "fail", found, remedy, node, True))
    findings += _slow(answers)
    return findings or [Finding("names", "ok", f"each of {len(answers)} nodes finds all host names")]


def _problem(told: Mapping[str, Any]) -> str:
    if told["error"]:
        return str(told["error"])
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in told["addresses"]):
        return f"it is {told['addresses'][0]}, which leads no further than the node itself"
    return ""


def _lone(node: str, host: str, problem: str) -> Finding:
    if problem and "leads no further" not in problem:
        return Finding("names", "warn", f"its own name {host}: {problem}", f"add {host} to /etc/hosts", node)
    return Finding("names", "ok", f"{host} is known to itself")


def _slow(answers: Mapping[str, Answer]) -> list[Finding]:
    findings = []
    for node, answer in answers.items():
        slowest = max(answer, key=lambda name: float(answer[name]["seconds"]))
        seconds = float(answer[slowest]["seconds"])
        if seconds > SLOW_S and not answer[slowest]["error"]:
            remedy = "look at the name servers in /etc/resolv.conf: the first of them may be dead"
            findings.append(Finding("names", "warn", f"{slowest} took {seconds:.0f} s to look up", remedy, node))
    return findings
