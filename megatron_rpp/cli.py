"""The command `rpp`. Answers --help without importing torch.

    rpp train CONFIG.toml ... [--section.key=value ...] [--resume[=auto]] [--check]
    rpp sft CONFIG.toml ... [--section.key=value ...] [--check]
    rpp report RUN_DIR
    rpp plan CONFIG.toml ... [--section.key=value ...] [--gpus N]
    rpp doctor CONFIG.toml ... [--section.key=value ...]
    rpp launch slurm CONFIG.toml ... [--section.key=value ...] --nodes N [--dry-run]
    rpp serve CONFIG.toml ... [--section.key=value ...] [--host ADDRESS]

Without a launcher, `train` and `sft` start their ranks on this host; each rank is this same command
under torchrun, srun or mpirun, or with the variables that they set.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_rpp.commands.messages import user_error
from megatron_rpp.commands.words import HelpAsked
from megatron_rpp.config.errors import ConfigError

# Each is a module of megatron_rpp.commands with `run(words) -> exit code`, where words[0] is the command.
_COMMANDS = {
    "train": "train",
    "sft": "train",
    "report": "report",
    "plan": "plan",
    "doctor": "doctor",
    "launch": "launch",
    "serve": "serve",
    "slurm-job": "slurm_job",  # what the batch script of `launch slurm` runs
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistake, 1 for ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    try:
        if command in ("--help", "-h", "help"):
            sys.stdout.write(_usage())
            return 0
        if command not in _COMMANDS:
            known = ", ".join(name for name in _COMMANDS if name != "slurm-job")
            raise ConfigError(f"unknown command {command}; it must be one of: {known}")
        return int(importlib.import_module(f"megatron_rpp.commands.{_COMMANDS[command]}").run(words))
    except HelpAsked as asked:
        sys.stdout.write(str(asked))
        return 0
    except ValueError as error:
        return user_error(error)


def _usage() -> str:
    synopsis = (__doc__ or "").partition("\n\n")[2]
    title = "REINFORCE++ training on Megatron-Core, with SGLang rollouts."
    return f"{title}\n\n{synopsis}\n`rpp train --help` lists every setting.\n"


if __name__ == "__main__":
    sys.exit(main())
