"""A new job in place of one that has lost a node.

`scontrol requeue` would wait in state COMPLETING until SLURM gives the dead node up (SlurmdTimeout); a job that is
submitted anew starts at once on other nodes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rpp.observability.files import write_whole
from megatron_rpp.slurm import client
from megatron_rpp.slurm.allocation import Allocation
from megatron_rpp.slurm.history import History

# scontrol's name of a property -> sbatch's option. What was given on sbatch's command line is in no file.
_OPTIONS = {
    "JobName": "--job-name",
    "Account": "--account",
    "Partition": "--partition",
    "QOS": "--qos",
    "TimeLimit": "--time",
    "NumNodes": "--nodes",
    "MinMemoryNode": "--mem",
    "TresPerNode": "--gres",
    "Features": "--constraint",
    "Licenses": "--licenses",
    "Reservation": "--reservation",
    "WorkDir": "--chdir",
}


@dataclass(frozen=True)
class Submission:
    """How a job was submitted, as far as it takes to submit it again."""

    job: str  # as SLURM's commands must be told
    nodes: list[str]  # of this start; the batch host first
    options: list[list[str]]  # sbatch's, a list for each part of a heterogeneous job
    excluded: list[str]  # by the user
    script: str
    words: list[str]  # of the script's command line
    max_tries: int


class Replacement:
    """Of one start of a job. Supervisor and guards may all try; the claim lets one of them through."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._folder = run_dir / "slurm"
        self.history = History(run_dir)
        self.is_alive_file = self._path(".alive")  # the supervisor touches it

    def save(self, allocation: Allocation, words: Sequence[str], max_tries: int) -> None:
        """Note how the running job can be submitted again. Raises SlurmError, OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        script = self._folder / f"job-{allocation.job_id}.sbatch"
        client.batch_script(allocation.job_id, script)
        parts = client.jobs(allocation.job)
        noted = Submission(
            job=allocation.job,
            nodes=list(allocation.nodes),
            options=[_options(part) for part in parts],
            excluded=list(client.hostnames(parts[0]["ExcNodeList"])) if parts[0].get("ExcNodeList") else [],
            script=str(script.resolve()),
            words=list(words),
            max_tries=max_tries,
        )
        write_whole(self._path(".json"), json.dumps(asdict(noted), indent=1))

    def load(self) -> Submission:
        return Submission(**json.loads(self._path(".json").read_text()))

    def submit_once(self) -> str | None:
        """Submit without all nodes that were found bad; the new job's id. None: someone else has, or is about to.

        Where SLURM has too few nodes left, only those that the newest try found bad are left out, then none but
        the user's. Raises SlurmError, after which anyone may try again.
        """
        if not self._claim():
            return None
        comment = f"rpp:{self._attempt}"
        try:
            if known := client.find_by_comment(comment):  # an sbatch that got no answer was heard all the same
                return known
            return self._submit(comment)
        except client.SlurmError:
            self._path(".replaced").unlink()
            raise

    def _submit(self, comment: str) -> str:
        submission, bad = self.load(), self.history.excluded()
        newest = self.history.tries()[-1].bad_nodes
        error: client.SlurmError | None = None
        for nodes in dict.fromkeys((tuple(bad), tuple(newest), ())):
            exclude = f"--exclude={','.join([*submission.excluded, *nodes])}"
            arguments: list[str] = []
            for part in submission.options:
                arguments += [*([":"] if arguments else []), *part, exclude, f"--comment={comment}"]
            try:
                return client.submit([*arguments, submission.script, *submission.words])
            except client.SlurmError as refused:
                error = refused
        assert error is not None
        raise error

    def _claim(self) -> bool:
        try:
            os.close(os.open(self._path(".replaced"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._attempt}{suffix}"


def _options(fields: dict[str, str]) -> list[str]:
    options = [f"{option}={fields[name]}" for name, option in _OPTIONS.items() if fields.get(name)]
    if fields.get("StdOut"):
        options += [f"--output={fields['StdOut']}", "--open-mode=append"]
    return [re.sub(r"^--gres=gres[:/]", "--gres=", option) for option in options]
