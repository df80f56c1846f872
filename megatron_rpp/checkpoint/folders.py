"""The folders of RUN_DIR/checkpoints: which are whole, which are kept, and what killed jobs have left.

step-000020                    a checkpoint; only whole ones get such a name
step-000020.1f0c9d2e.partial   being written, or what a killed job has left of it
step-000020.1f0c9d2e.deleting  being deleted
step-000020.1f0c9d2e.damaged   found damaged when a run was resumed
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from megatron_rpp.checkpoint.files import damage
from megatron_rpp.observability.files import sync_path

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-(\d+)(?:\.[0-9a-f]+)?\.(partial|deleting|damaged)")


def checkpoints_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or will be."""
    return checkpoints_folder(run_dir) / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def step_folders(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first; something may have damaged them since."""
    folder = checkpoints_folder(run_dir)
    return sorted((p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir()), key=step_of)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint with all its files in full size, or None. Contents are not read: see find_checkpoint."""
    whole = (folder for folder in reversed(step_folders(run_dir)) if not damage(folder, read=False))
    return next(whole, None)


def new_partial(final: Path) -> Path:
    """Make the empty folder in which `final` is written; its name is new, so that no killed job still writes there."""
    partial = _beside(final, "partial")
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, final: Path) -> None:
    """Give the whole `partial` its name. What had that name goes away."""
    sync_path(partial)
    old = final.rename(_beside(final, "deleting")) if final.exists() else None
    partial.rename(final)
    sync_path(final.parent)
    if old is not None:
        _remove(old)


def set_aside(folder: Path) -> None:
    """A damaged checkpoint counts no more; it is deleted when a newer one is whole."""
    folder.rename(_beside(folder, "damaged"))


def prune(run_dir: str | Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints and those of steps that `keep_every` divides (0: none).

    For after a checkpoint has become whole; what killed jobs have left goes too. What cannot be deleted is logged.
    """
    old = step_folders(run_dir)[:-keep]
    remove_all(folder for folder in old if not keep_every or step_of(folder) % keep_every)
    remove_all(leftovers(run_dir))


def leftovers(run_dir: str | Path, kinds: Iterable[str] = ("partial", "deleting", "damaged")) -> list[Path]:
    """What is half written, half deleted or damaged."""
    found = ((path, _LEFTOVER.fullmatch(path.name)) for path in checkpoints_folder(run_dir).glob("step-*.*"))
    return [path for path, match in found if match and match[2] in kinds]


def remove_all(folders: Iterable[Path]) -> None:
    """Delete `folders`; a failure is logged, as it harms no run."""
    for folder in folders:
        try:
            _remove(folder)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", folder, error)


def _remove(folder: Path) -> None:
    """Renamed first, so that it never looks whole while it is not."""
    doomed = folder if folder.suffix == ".deleting" else _beside(folder, "deleting")
    if doomed != folder:
        folder.rename(doomed)
    shutil.rmtree(doomed)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name.split('.')[0]}.{uuid.uuid4().hex[:8]}.{kind}")
