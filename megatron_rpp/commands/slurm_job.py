"""`rpp slurm-job CONFIG.toml ...`: what a batch script runs; see launch/slurm. `%a` in a word is the array index."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config
from megatron_rpp.config.validate import validate
from megatron_rpp.slurm.allocation import Allocation, ranks_per_node
from megatron_rpp.slurm.supervisor import Supervisor


def run(words: Sequence[str]) -> int:
    """One start of a job; the exit code of its batch script."""
    logging.basicConfig(format="%(asctime)s rpp slurm-job: %(message)s", level=logging.INFO, stream=sys.stderr)
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    given = [word.replace("%a", index) for word in words[1:]]
    if any("%a" in word for word in words) and not index:
        raise ConfigError("%a stands for the index of an array task; submit with sbatch --array=0-3")
    config = load_config([w for w in given if not w.startswith("-")], [w for w in given if w.startswith("-")])
    validate(config, "train")
    allocation = Allocation.of_this_job(os.environ)
    ranks_per_node(config, len(allocation.trainer_nodes))
    once = list(dict.fromkeys(reversed(given)))[::-1]  # a replacement is given again what its script adds
    return Supervisor(config, allocation, once).run()
