"""Faults of a single node, planted in its own mount namespace and gone at the end of a `with` block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.launch.cluster import Cluster

_LISTEN = """
import socket, sys
taken = socket.create_server(("", int(sys.argv[1])))
print("up", flush=True)
sys.stdin.read()
"""


@contextmanager
def mounted(cluster: Cluster, node: str, target: Path, *words: str | Path) -> Iterator[None]:
    """`mount WORDS target` on the node alone."""
    enter = ["nsenter", f"--target={_slurmd(cluster, node)}", "--mount"]
    subprocess.run([*enter, "mount", *map(str, words), str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", "--lazy", str(target)], check=True)


@contextmanager
def read_only(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """The node sees `folder` and cannot write to it."""
    with mounted(cluster, node, folder, "-o", "bind,ro", folder):
        yield


@contextmanager
def listening(cluster: Cluster, node: str, port: int) -> Iterator[None]:
    """Somebody else has `port` on the node."""
    argv = cluster.hosts.argv(node, [sys.executable, "-c", _LISTEN, str(port)])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        try:
            yield
        finally:
            other.communicate(timeout=30)


def _slurmd(cluster: Cluster, node: str) -> int:
    return next(pid for pid in cluster.pids(node) if psutil.Process(pid).name() == "slurmd")
