"""SLURM's own commands, each with a time limit: a controller that does not answer must not hang a job.

A job is named as SLURM wants it: JOB, or ARRAYJOB_TASK, since the bare id of one array task stands for them all.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rpp.config.own_environment import inherited

_LIMIT_S = 60.0


class SlurmError(RuntimeError):
    """A SLURM command failed; the message is the command and what it said."""


def hostnames(node_list: str) -> tuple[str, ...]:
    """`node[1-3,7]` as single names, in order."""
    return tuple(run("scontrol", "show", "hostnames", node_list).split())


def jobs(job: str) -> list[dict[str, str]]:
    """What `scontrol show job` says of a job, or of each part of a heterogeneous one, by SLURM's names for it."""
    text = run("scontrol", "show", "job", "--oneliner", job)
    return [parse_fields(line) for line in text.splitlines() if line.strip()]


def job_state(job: str) -> str:
    """RUNNING, COMPLETING, CANCELLED, ..."""
    return jobs(job)[0]["JobState"]


def parse_fields(line: str) -> dict[str, str]:
    """A line of `scontrol --oneliner`: {"JobId": "3", ...}. A value may hold spaces; none is told as (null) or N/A."""
    fields: dict[str, str] = {}
    last = ""
    for word in line.split():
        name, equals, value = word.partition("=")
        if equals and name[:1].isalpha():
            last, fields[name] = name, "" if value in ("(null)", "N/A") else value
        elif last:
            fields[last] += f" {word}"
    return fields


def batch_script(job_id: str, path: Path) -> None:
    """Write the script that the job was submitted with to `path`."""
    run("scontrol", "write", "batch_script", job_id, str(path))


def submit(arguments: Sequence[str]) -> str:
    """`sbatch`; the id of the new job."""
    return run("sbatch", "--parsable", *arguments, env=outside_environment(inherited())).strip().partition(";")[0]


def find_by_comment(comment: str) -> str | None:
    """The id of a job of this user, waiting or running, that was submitted with `--comment`."""
    lines = run("squeue", "--me", "--noheader", "--format=%i|%k").splitlines()
    return next((line.partition("|")[0] for line in lines if line.partition("|")[2] == comment), None)


def requeue(job: str) -> None:
    """Put a running job back into the queue, under the same id. It ends whoever calls this from inside the job."""
    run("scontrol", "requeue", job)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """A job that waits in the queue gets none of `nodes`."""
    run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def cancel(job: str) -> None:
    run("scancel", job)


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
