"""`rpp slurm-job CONFIG.toml ...`: what a batch script runs; see launch/slurm."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from megatron_rpp.commands.words import answer_help, split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config
from megatron_rpp.config.validate import validate
from megatron_rpp.slurm.allocation import Allocation, ranks_per_node
from megatron_rpp.slurm.supervisor import Supervisor

_USAGE = """\
rpp slurm-job CONFIG.toml ... [--section.key=value ...]

What a batch script of launch/slurm runs, once, on the first node: it checks the nodes, starts servers and trainer on
all of them with srun, watches them, and requeues or replaces the job. `%a` in a word is the index of an array task.
To submit a job, write `rpp launch slurm`, or sbatch and one of the scripts; docs/cluster.md.

Exit code: 0 the run is complete, 1 given up, 2 a mistake in the configuration, 75 in the queue again.
"""


def run(words: Sequence[str]) -> int:
    """One start of a job; the exit code of its batch script."""
    answer_help(words, _USAGE)
    logging.basicConfig(format="%(asctime)s rpp slurm-job: %(message)s", level=logging.INFO, stream=sys.stderr)
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if any("%a" in word for word in words) and not index:
        raise ConfigError("%a stands for the index of an array task; submit with sbatch --array=0-3")
    given = split([word.replace("%a", index) for word in words[1:]], _USAGE)
    config = load_config(given.files, given.overrides)
    validate(config, "train")
    allocation = Allocation.of_this_job(os.environ)
    ranks_per_node(config, len(allocation.trainer_nodes))
    once = list(dict.fromkeys(reversed(given.settings)))[::-1]  # a replacement is given again what its script adds
    return Supervisor(config, allocation, once).run()
