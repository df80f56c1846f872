"""Stands for srun: a probe for each node, all with this command's standard input, as SLURM copies it.

    python fake_srun.py FAULTS NODE,NODE,... COMMAND ...

FAULTS is JSON, {node: what}: `unlaunched` (SLURM ends the whole step), `mute` (the probe never answers) or `dead` (it
ends at the first question).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

MUTE = "import sys; sys.stdin.read()"
DEAD = "import sys; sys.stdin.readline(); print('srun: error: task 0: Killed', file=sys.stderr)"


def main() -> None:
    faults, nodes = json.loads(sys.argv[1]), sys.argv[2].split(",")
    tasks = [_start(node, faults.get(node, ""), sys.argv[3:]) for node in nodes]
    if unlaunched := [node for node in nodes if faults.get(node) == "unlaunched"]:
        time.sleep(1.0)  # the others have answered by then
        for node in unlaunched:
            sys.stderr.write(f"srun: error: Task launch for StepId=2.0 failed on node {node}: Connection failure\n")
        for task in tasks:
            task.kill()
        sys.exit(233)
    for line in sys.stdin.buffer:
        for task in tasks:
            try:
                task.stdin.write(line)
                task.stdin.flush()
            except OSError:
                continue
    for task in tasks:
        task.stdin.close()
    for task in tasks:
        task.wait()


def _start(node: str, fault: str, command: list[str]) -> subprocess.Popen[bytes]:
    argv = {"mute": [sys.executable, "-c", MUTE], "unlaunched": [sys.executable, "-c", MUTE]}.get(fault, command)
    argv = [sys.executable, "-c", DEAD] if fault == "dead" else argv
    return subprocess.Popen(argv, stdin=subprocess.PIPE, env={**os.environ, "SLURMD_NODENAME": node})


if __name__ == "__main__":
    main()
