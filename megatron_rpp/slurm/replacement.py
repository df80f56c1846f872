"""A new job in place of one that has lost a node.

`scontrol requeue` would wait in state COMPLETING until SLURM gives the dead node up (SlurmdTimeout); a job that is
submitted anew starts at once on other nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rpp.slurm import client
from megatron_rpp.slurm.history import History, Try, steps_done

# scontrol's name of a property -> sbatch's option. What was given on sbatch's command line is in no file.
_OPTIONS = {
    "JobName": "--job-name",
    "Account": "--account",
    "Partition": "--partition",
    "QOS": "--qos",
    "TimeLimit": "--time",
    "NumNodes": "--nodes",
    "TresPerNode": "--gres",
    "Features": "--constraint",
    "Reservation": "--reservation",
    "WorkDir": "--chdir",
}


@dataclass(frozen=True)
class Submission:
    """How a job was submitted, as far as it takes to submit it again."""

    nodes: list[str]  # of this start; the batch host first
    options: list[list[str]]  # sbatch's, a list for each part of a heterogeneous job
    script: str
    words: list[str]  # of the script's command line


class Replacement:
    """Of one start of a job. Supervisor and guards may all try; the claim lets one of them through."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self.run_dir, self.attempt = run_dir, attempt
        self._folder = run_dir / "slurm"

    def save(self, nodes: Sequence[str], words: Sequence[str]) -> None:
        """Note how the running job can be submitted again. Raises SlurmError, OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        job_id = self.attempt.partition(".")[0]
        script = self._folder / f"job-{job_id}.sbatch"
        client.batch_script(job_id, script)
        parts = client.component_ids(job_id)
        noted = Submission(list(nodes), [_options(part) for part in parts], str(script.resolve()), list(words))
        partial = self._path(".partial")
        partial.write_text(json.dumps(asdict(noted), indent=1))
        partial.replace(self._path(".json"))

    def load(self) -> Submission:
        return Submission(**json.loads(self._path(".json").read_text()))

    def claim(self) -> bool:
        """Whether the caller is the first who asks."""
        try:
            os.close(os.open(self._path(".replaced"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def give_back(self) -> None:
        """The claimant could not submit."""
        self._path(".replaced").unlink()

    def submit(self, lost: Sequence[str], cause: str) -> str:
        """Submit without the nodes `lost` and those excluded before; the new job's id. Raises SlurmError."""
        submission, history = self.load(), History(self.run_dir)
        history.end(self.attempt, Try.LOST_NODES, cause, steps_done(self.run_dir), lost)
        exclude = f"--exclude={','.join(history.excluded())}"
        arguments: list[str] = []
        for part in submission.options:
            arguments += [*([":"] if arguments else []), *part, exclude]
        return client.submit([*arguments, submission.script, *submission.words])

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self.attempt}{suffix}"


def _options(job_id: str) -> list[str]:
    fields = client.job_fields(job_id)
    options = [f"{option}={fields[name]}" for name, option in _OPTIONS.items() if fields.get(name)]
    if fields.get("StdOut"):
        options += [f"--output={fields['StdOut']}", "--open-mode=append"]
    return [option.replace("--gres=gres:", "--gres=") for option in options]
