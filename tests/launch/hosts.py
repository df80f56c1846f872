"""Hosts of a network of their own: each has a host name, an address, its own ports, and can be killed or cut off.

A host is a network namespace; what runs on it also has its own mount and UTS namespaces, for /etc/hosts and the name.
All share this machine's files and processors. The first host holds the switch, so that nothing of the network is
seen from outside and any number of them can be there at once. Needs root.

`python -m tests.launch.hosts NAME FOLDER` removes such a network once its stdin ends, however its owner has ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NET = "10.77.0"
# $0 is the host's name, $1 its /etc/hosts; the rest is the command.
_ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class Hosts:
    """`names[0]` is 10.77.0.1, and so on. Raises RuntimeError where this machine does not let them be made."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """folder: for /etc/hosts; it is removed with the hosts."""
        self.names, self._folder = tuple(names), folder
        self._network = f"rpp-{secrets.token_hex(4)}"
        folder.mkdir(parents=True, exist_ok=True)
        known = [f"{self.address(name)} {name}" for name in names]
        self._etc_hosts = folder / "hosts"
        self._etc_hosts.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        argv = [sys.executable, "-m", "tests.launch.hosts", self._network, str(folder)]
        root = Path(__file__).parents[2]
        self._reaper = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True, cwd=root)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"{NET}.{self.names.index(name) + 1}"

    def argv(self, name: str, command: Sequence[str], etc_hosts: Path | None = None) -> list[str]:
        """`command` as it is run on host `name`; etc_hosts: what it finds at /etc/hosts instead."""
        space = ["ip", "netns", "exec", self._space(name), "unshare", "-m", "-u", "--propagation", "private"]
        return [*space, "bash", "-c", _ENTER, name, str(etc_hosts or self._etc_hosts), *command]

    def pids(self, name: str) -> list[int]:
        """Processes of the host."""
        return _pids(self._space(name))

    def cut(self, name: str) -> None:
        """Unplug the host at the switch: its packets and those to it vanish, and nobody is told."""
        _ip("-n", self._space(self.names[0]), "link", "set", f"to-{name}", "nomaster")

    def mend(self, name: str) -> None:
        _ip("-n", self._space(self.names[0]), "link", "set", f"to-{name}", "master", "switch")

    def kill(self, name: str) -> None:
        """The host loses its power: no connection is closed, all processes are gone."""
        self.cut(name)
        _kill(self._space(name))

    def close(self) -> None:
        """Remove all of it: processes, network and folder."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        if self._reaper.wait(timeout=60):
            raise RuntimeError(f"the test network {self._network} could not be removed")

    def _space(self, name: str) -> str:
        return f"{self._network}-{name}"

    def _build(self) -> None:
        first, *others = self.names
        for name in self.names:
            _ip("netns", "add", self._space(name))
            _ip("-n", self._space(name), "link", "set", "lo", "up")
        inside = ("-n", self._space(first))
        _ip(*inside, "link", "add", "switch", "type", "bridge")
        _ip(*inside, "addr", "add", f"{self.address(first)}/24", "dev", "switch")
        _ip(*inside, "link", "set", "switch", "up")
        for name in others:
            space = self._space(name)
            peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _ip(*inside, "link", "add", f"to-{name}", *peer)
            _ip(*inside, "link", "set", f"to-{name}", "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")


def _ip(*words: str) -> str:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise RuntimeError("`ip` is missing; run tools/slurm.sh, which installs it") from error
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()} (test hosts need root and network namespaces)")
    return done.stdout


def _pids(space: str) -> list[int]:
    return [int(word) for word in _ip("netns", "pids", space).split()]


def _kill(space: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while pids := _pids(space):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{space}: processes {pids} cannot be killed")
        time.sleep(0.02)


def remove(network: str, folder: Path) -> None:
    """Every host whose namespace is `network`'s, and `folder`."""
    spaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{network}-")]
    for space in spaces:
        _kill(space)
    for space in spaces:
        _ip("netns", "del", space)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()
    remove(sys.argv[1], Path(sys.argv[2]))
