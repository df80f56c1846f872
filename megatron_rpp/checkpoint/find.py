"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.checkpoint.files import MANIFEST, damage
from megatron_rpp.checkpoint.folders import checkpoints_folder, set_aside, step_folders
from megatron_rpp.parallel.collectives import gather_objects

logger = logging.getLogger(__name__)

_NAMED = 5  # files that a warning names


def find_checkpoint(run_dir: str | Path, *, verify: bool) -> Path | None:
    """The newest whole checkpoint; None where the run has none at all. A collective over the whole job.

    Damaged ones are passed over with a warning that names their files, and set aside (step-N.*.damaged).
    verify: read every file and compare checksums, shared out over the ranks; otherwise sizes alone are compared.

    Raises ValueError on every rank where there are checkpoints and all are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folders = gather_objects(step_folders(run_dir))[0]  # rank 0's view of a folder that may lag on other hosts
    damaged: list[Path] = []
    for folder in reversed(folders):
        mine = slice(rank, None, world_size)
        lines = [line for lines in gather_objects(damage(folder, read=verify, part=mine)) for line in lines]
        if not lines:
            if rank == 0:
                _accept(folder, damaged)
            return folder
        damaged.append(folder)
        if rank == 0:
            found = list(dict.fromkeys(lines))
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            logger.warning("%s is damaged and passed over: %s%s", folder, "; ".join(found[:_NAMED]), more)
    if folders:
        raise ValueError(
            f"every checkpoint in {checkpoints_folder(run_dir)} is damaged (see the log); "
            "restore one, or start again in another run.dir"
        )
    return None


def _accept(folder: Path, damaged: Sequence[Path]) -> None:
    """Only now do the newer ones give up their names: a run without any checkpoint would start over."""
    for newer in damaged:
        with suppress(OSError):  # then it is passed over again next time
            set_aside(newer)
    if not (folder / MANIFEST).is_file():
        logger.info("%s has no %s: an older version wrote it; its files cannot be verified", folder, MANIFEST)
