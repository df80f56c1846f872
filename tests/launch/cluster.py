"""A real SLURM cluster on this machine, for as long as a test session."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from megatron_rpp.slurm.client import parse_fields
from tests.launch.hosts import Hosts
from tests.launch.slurm_conf import write_configuration

CONTROLLER = "ctl"
START_S = 60.0
POLL_S = 0.2
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
)
REPOSITORY = Path(__file__).parents[2]


class Cluster:
    """slurmctld on a host of its own, and a slurmd on each node. Raises RuntimeError where it cannot start."""

    def __init__(self, root: Path, num_nodes: int = 4) -> None:
        """root: removed at the end."""
        missing = [name for name in ("slurmctld", "slurmd", "srun", "ip") if not _program(name)]
        if missing:
            raise RuntimeError(f"{', '.join(missing)}: missing; run tools/slurm.sh, which installs them")
        self.nodes = tuple(f"node{index + 1}" for index in range(num_nodes))
        self.root = root
        self.hosts = Hosts([CONTROLLER, *self.nodes], root)
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # Jobs

    def submit(self, words: Sequence[str | Path], cwd: Path = REPOSITORY, env: Mapping[str, str] | None = None) -> str:
        """sbatch with `words`; the job's id."""
        done = self.run(["sbatch", "--parsable", *map(str, words)], cwd=cwd, env=env)
        return done.stdout.strip().splitlines()[-1].partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says; of a heterogeneous job's or an array's first part."""
        return self.jobs(job_id)[0]

    def jobs(self, job_id: str) -> list[dict[str, str]]:
        """The same of every part."""
        text = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
        return [parse_fields(line) for line in text.splitlines() if line.strip()]

    def wait(self, job_id: str, states: Collection[str] = ENDED, timeout_s: float = 60.0) -> dict[str, str]:
        """The job, once every part of it is in one of `states`; AssertionError tells how it stands where it is late."""
        deadline = time.monotonic() + timeout_s
        while True:
            jobs = self.jobs(job_id)
            if all(job["JobState"] in states for job in jobs):
                return jobs[0]
            if time.monotonic() > deadline:
                found = ", ".join(job["JobState"] for job in jobs)
                wanted = ", ".join(sorted(states))
                late = f"job {job_id} is {found}, not {wanted}, after {timeout_s:g} s"
                raise AssertionError(f"{late}\n{self.story(jobs)}")
            time.sleep(POLL_S)

    def story(self, jobs: Sequence[Mapping[str, str]]) -> str:
        """What a failed test should show: the jobs, the nodes, the ends of the logs."""
        outputs = [Path(job["StdOut"]) for job in jobs if job.get("StdOut", "/dev/null") != "/dev/null"]
        logs = [*outputs, *sorted((self.root / "log").glob("*.log"))]
        tails = [f"--- {path}\n{_tail(path)}" for path in dict.fromkeys(logs)]
        sinfo = self.run(["sinfo", "-N", "-l"], check=False).stdout
        return "\n".join([*map(str, jobs), sinfo, *tails])

    # Hosts

    def run(
        self,
        words: Sequence[str | Path],
        *,
        on: str = CONTROLLER,
        timeout_s: float = 60.0,
        check: bool = True,
        cwd: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host of the cluster, outside of any job; AssertionError where it fails and `check`."""
        argv = self.hosts.argv(on, list(map(str, words)))
        done = subprocess.run(
            argv, cwd=cwd, env=self.environment(env), capture_output=True, text=True, timeout=timeout_s
        )
        assert not check or done.returncode == 0, f"{words} on {on}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a login shell on the cluster: nothing of another job's, and the path of the Debian packages."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_", "OMPI_"))}
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        return {**own, "PATH": path, "SLURM_CONF": str(self.conf), **(more or {})}

    def pids(self, name: str) -> list[int]:
        return self.hosts.pids(name)

    def kill_node(self, name: str) -> None:
        """The node loses its power. SLURM will not notice within SlurmdTimeout (300 s)."""
        self.hosts.kill(name)

    def cut(self, name: str) -> None:
        """The node is out of reach for all others, and lives on."""
        self.hosts.cut(name)

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        self.hosts.mend(name)

    def start_node(self, name: str, timeout_s: float = START_S) -> None:
        """Start a killed node anew, and wait for it."""
        before = self._started_at(name)
        self.hosts.mend(name)
        self._slurmd(name)
        self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False)  # if it was down
        is_back = lambda: self._started_at(name) != before and self.node_state(name) == "idle"  # noqa: E731
        self._wait_until(is_back, f"{name} did not come back", timeout_s)

    def node_state(self, name: str) -> str:
        """As sinfo has it: idle, mixed, allocated, down*, ..."""
        return self.run(["sinfo", "-h", "-N", "-n", name, "-o", "%T"]).stdout.strip()

    def close(self) -> None:
        """Leave no process, no namespace and no file."""
        self.hosts.close()
        for daemon in self._daemons:
            daemon.wait(timeout=30)

    # Start

    def _start(self) -> None:
        addresses = {name: self.hosts.address(name) for name in self.nodes}
        self.conf = write_configuration(self.root, (CONTROLLER, self.hosts.address(CONTROLLER)), addresses)
        self._daemon(CONTROLLER, "slurmctld", "-c")
        # A slurmd that comes too early may try again only after 10 s.
        self._wait_until(self._is_up, "slurmctld does not answer")
        for name in self.nodes:
            self._slurmd(name)
        self._wait_until(lambda: self._states().count("idle") == len(self.nodes), "the nodes are not idle")

    def _slurmd(self, name: str) -> None:
        self._daemon(name, "slurmd", "-c")

    def _daemon(self, host: str, program: str, *flags: str) -> None:
        argv = self.hosts.argv(host, [_program(program) or program, "-D", "-f", str(self.conf), *flags])
        with (self.root / "log" / f"{program}-{host}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    argv, env=self.environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                )
            )

    def _started_at(self, name: str) -> str:
        return parse_fields(self.run(["scontrol", "--oneliner", "show", "node", name]).stdout)["SlurmdStartTime"]

    def _is_up(self) -> bool:
        return "is UP" in self.run(["scontrol", "ping"], check=False).stdout

    def _states(self) -> list[str]:
        return self.run(["sinfo", "-h", "-N", "-o", "%T"], check=False).stdout.split()

    def _wait_until(self, done: Callable[[], bool], otherwise: str, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline or self._daemons[0].poll() is not None:
                logs = sorted((self.root / "log").glob("*"))
                raise RuntimeError("\n".join([f"the test cluster: {otherwise}", *map(_tail, logs)]))
            time.sleep(0.1)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else ""
