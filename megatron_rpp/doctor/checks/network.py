"""How fast do the nodes exchange tensors? NCCL between GPUs, gloo on CPU, one process a node."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from megatron_rpp.doctor.finding import Finding
from megatron_rpp.doctor.job import Job

LIMIT_S = 60.0
SLOW = 0.3  # of the median pair
_BYTES = {"gloo": 4 * 2**20, "nccl": 64 * 2**20}
_REPEATS = 3
_stores: list[Any] = []  # of this probe, until it ends


def open_store(world_size: int) -> int:
    """On the first node: a store for the others, at a port that the system chooses."""
    import torch.distributed as dist

    wait = timedelta(seconds=LIMIT_S)
    _stores.append(dist.TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False, timeout=wait))
    return int(_stores[-1].port)


def measure(ranks: Mapping[str, int], address: str, port: int) -> dict[str, Any]:
    """{"backend", "all_reduce": bytes/s, "from": {rank: bytes/s}} as this node sees it. A collective of `ranks`."""
    import torch.distributed as dist

    from megatron_rpp import device
    from megatron_rpp.parallel.environment import node_name
    from megatron_rpp.parallel.interfaces import choose_interfaces

    rank, wait = ranks[node_name()], timedelta(seconds=LIMIT_S / 2)
    device.select(0)
    choose_interfaces(address)
    store = dist.TCPStore(address, port, len(ranks), is_master=False, timeout=wait)
    dist.init_process_group(device.backend(), store=store, rank=rank, world_size=len(ranks), timeout=wait)
    try:
        return {"backend": device.backend(), "all_reduce": _all_reduce(), "from": _pairs(rank, len(ranks))}
    finally:
        dist.destroy_process_group()


def _all_reduce() -> float:
    """Bytes a second of one reduction, at its best."""
    import torch
    import torch.distributed as dist

    from megatron_rpp import device

    size = _BYTES[device.backend()]
    tensor = torch.ones(size // 4, device=device.current())
    best = 0.0
    for _ in range(_REPEATS):
        tensor.fill_(1.0)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        total = float(tensor[-1])  # waits for the device
        best = max(best, size / (time.perf_counter() - start))
        if total != dist.get_world_size():
            raise RuntimeError(f"an all-reduce of ones over {dist.get_world_size()} nodes gave {total}")
    return best


def _pairs(rank: int, world_size: int) -> dict[int, float]:
    """{rank: bytes a second that came from it} of both neighbours in the ring, all pairs at once."""
    import torch
    import torch.distributed as dist

    from megatron_rpp import device

    size = _BYTES[device.backend()]
    out, into = (torch.ones(size // 4, device=device.current()) for _ in range(2))
    best: dict[int, float] = {}
    for step in [1, -1] * _REPEATS if world_size > 2 else [1] * _REPEATS:
        target, source = (rank + step) % world_size, (rank - step) % world_size
        dist.barrier()
        start = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, target), dist.P2POp(dist.irecv, into, source)]):
            work.wait()
        float(into[-1])
        best[source] = max(best.get(source, 0.0), size / (time.perf_counter() - start))
    return best


def check(job: Job) -> list[Finding]:
    """Among the nodes that reach each other: one that does not would hold all of them up."""
    accused = {f.node for f in job.findings if f.check == "reach" and f.status == "fail"}
    nodes = [node for node in job.nodes if node not in accused and node in job.addresses]
    if len(job.nodes) < 2:
        return [Finding("network", "ok", "one node")]
    if len(nodes) < 2:
        remedy = "cure what the check of reach has found"
        return [Finding("network", "warn", "not measured: no two nodes reach each other", remedy)]
    opened = job.ask("network", "network.open_store", nodes[:1], world_size=len(nodes))
    if not opened:
        return []
    ranks = {node: rank for rank, node in enumerate(nodes)}
    about = {"ranks": ranks, "address": job.addresses[nodes[0]], "port": opened[nodes[0]]}
    return judge(job.ask("network", "network.measure", nodes, LIMIT_S, **about), nodes)


def judge(answers: Mapping[str, Mapping[str, Any]], nodes: Sequence[str]) -> list[Finding]:
    """nodes: by rank."""
    speeds = {
        (nodes[int(source)], node): float(speed)
        for node, answer in answers.items()
        for source, speed in answer["from"].items()
    }
    if not speeds:
        return []
    usual = median(speeds.values())
    findings = []
    for (source, target), speed in speeds.items():
        if speed < SLOW * usual:
            found = f"from {source} to {target} {_rate(speed)}, of most pairs {_rate(usual)}"
            remedy = f"compare cables, link speed and MTU of {source} and {target}; leave one of them out"
            findings.append(Finding("network", "warn", found, remedy, target))
    slowest = min(float(answer["all_reduce"]) for answer in answers.values())
    backend = next(iter(answers.values()))["backend"]
    words = f"{backend} over {len(answers)} nodes: all-reduce {_rate(slowest)}, a pair {_rate(usual)}"
    return [*findings, Finding("network", "ok", words)]


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s"
