"""The hosts of the test cluster leave nothing behind; test_job_faults shows that they can be killed and cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.cluster import REPOSITORY

OWNER = (
    "import subprocess, sys; from pathlib import Path; from tests.launch.hosts import Hosts\n"
    "hosts = Hosts(['a', 'b'], Path(sys.argv[1]))\n"
    "subprocess.Popen(hosts.argv('b', ['sleep', '600']), start_new_session=True)\n"
    "print(hosts._network, flush=True); sys.stdin.read()\n"
)


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


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
