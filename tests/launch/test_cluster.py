"""The test cluster itself: what other tests take for granted of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.cluster import REPOSITORY, Cluster
from tests.launch.hosts import Hosts

OWNER = (
    "import subprocess, sys; from pathlib import Path; from tests.launch.hosts import Hosts\n"
    "hosts = Hosts(['a', 'b'], Path(sys.argv[1]))\n"
    "subprocess.Popen(hosts.argv('b', ['sleep', '600']), start_new_session=True)\n"
    "print(hosts._network, flush=True); sys.stdin.read()\n"
)


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reaches(hosts: Hosts, name: str, other: str, port: int) -> bool:
    probe = f"timeout 1 bash -c '</dev/tcp/{other}/{port}'"
    return subprocess.run(hosts.argv(name, ["bash", "-c", probe]), stderr=subprocess.DEVNULL).returncode == 0


def test_a_killed_node_is_gone_unnoticed_and_comes_back(cluster: Cluster) -> None:
    ended = cluster.job(cluster.submit(["--nodelist=node4", "--output=/dev/null", "--wrap", "sleep 600"]))
    cluster.wait(ended["JobId"], {"RUNNING"})
    assert cluster.pids("node4")
    cluster.kill_node("node4")
    try:
        assert cluster.pids("node4") == []
        assert not reaches(cluster.hosts, "node1", "node4", 6818)
        assert cluster.node_state("node4") in ("mixed", "allocated")  # SlurmdTimeout is 300 s, as sites have it
    finally:
        cluster.run(["scancel", ended["JobId"]])
        cluster.start_node("node4")
    assert reaches(cluster.hosts, "node1", "node4", 6818)


def test_a_node_that_is_cut_off_lives_on(cluster: Cluster) -> None:
    before = cluster.pids("node4")
    cluster.cut("node4")
    assert not reaches(cluster.hosts, "node1", "node4", 6818)
    assert not reaches(cluster.hosts, "node4", "node1", 6818)
    assert before and cluster.pids("node4") == before
    cluster.mend("node4")
    assert reaches(cluster.hosts, "node1", "node4", 6818)


def test_a_second_cluster_beside_the_first_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "second"
    second = Cluster(root, num_nodes=1)
    try:
        job = second.submit(["--output=/dev/null", "--wrap", "sleep 600"])
        second.wait(job, {"RUNNING"})
        made = {space for space in spaces() if space.startswith(second.hosts._network)}
        assert len(made) == 2
        pids = [*second.pids("node1"), *second.pids("ctl")]
    finally:
        second.close()
    assert not root.exists() and not spaces() & made
    assert pids and not any(alive(pid) for pid in pids)
    assert cluster.node_state("node1") == "idle"


def test_hosts_end_with_a_killed_owner(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", OWNER, str(tmp_path / "hosts")]
    owner = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert owner.stdout is not None
    network = owner.stdout.readline().strip()
    assert {f"{network}-a", f"{network}-b"} <= spaces()
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 30
    while (tmp_path / "hosts").exists() or any(space.startswith(network) for space in spaces()):
        assert time.monotonic() < deadline, "the hosts outlive their owner"
        time.sleep(0.1)
