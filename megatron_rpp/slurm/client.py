"""SLURM's own commands, each with a time limit: a controller that does not answer must not hang a job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIMIT_S = 60.0


class SlurmError(RuntimeError):
    """A SLURM command failed; the message is the command and what it said."""


def hostnames(node_list: str) -> tuple[str, ...]:
    """`node[1-3,7]` as single names, in order."""
    return tuple(run("scontrol", "show", "hostnames", node_list).split())


def job_fields(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says, by its own names: JobState, NodeList, TimeLimit, ... (of its first component)."""
    text = run("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0]
    pairs = (word.partition("=") for word in text.split(" ") if "=" in word)
    return {name: "" if value in ("(null)", "N/A") else value for name, _, value in pairs}


def component_ids(job_id: str) -> tuple[str, ...]:
    """The job ids of a heterogeneous job's parts, or the job's own."""
    lines = run("scontrol", "show", "job", "--oneliner", job_id).splitlines()
    return tuple(line.split()[0].removeprefix("JobId=") for line in lines if line.startswith("JobId="))


def batch_script(job_id: str, path: Path) -> None:
    """Write the script that the job was submitted with to `path`."""
    run("scontrol", "write", "batch_script", job_id, str(path))


def submit(arguments: Sequence[str]) -> str:
    """`sbatch`; the id of the new job."""
    return run("sbatch", "--parsable", *arguments, env=outside_environment(os.environ)).strip().partition(";")[0]


def requeue(job_id: str) -> None:
    """Put a running job back into the queue, under the same id. It ends whoever calls this from inside the job."""
    run("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """A job that waits in the queue gets none of `nodes`."""
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def cancel(job_id: str) -> None:
    run("scancel", job_id)


def outside_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what a job's steps inherit: sbatch and srun would take some of it for options."""
    kept = ("SLURM_CONF",)
    return {name: value for name, value in env.items() if name in kept or not name.startswith(("SLURM", "SBATCH_"))}


def run(*argv: str, env: Mapping[str, str] | None = None, limit_s: float = _LIMIT_S) -> str:
    """Standard output of a command. Raises SlurmError where it fails, takes too long, or is not there."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_s, env=env, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SlurmError(f"{argv[0]} is not on PATH; run this where SLURM's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(argv)}: no answer within {limit_s:g} s") from error
    if done.returncode:
        raise SlurmError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
