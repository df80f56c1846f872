"""Checkpoints of a run: written in the background, whole or absent, the newest few kept, verified when they are read.

RUN_DIR/checkpoints/step-000020/ holds Megatron's `dist_checkpointing` files (model and optimizer, at any
layout), config and tokenizer of the model, run_state.json, every rank's generators, and a manifest of all that. A
directory gets that name only when everything in it is on disk.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.checkpoint.fence import Fence
from megatron_rpp.checkpoint.files import FileFacts, damage, facts_of, write_manifest
from megatron_rpp.checkpoint.folders import leftovers, new_partial, prune, put_in_place, remove_all, step_folder
from megatron_rpp.checkpoint.rng import rng_file, rng_state, save_rng
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import sharded_state
from megatron_rpp.checkpoint.snapshot import Snapshot, take_snapshot, write_common, write_snapshot, written_by
from megatron_rpp.config.job import CheckpointConfig
from megatron_rpp.device import dtype_name
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.model.build import Model
from megatron_rpp.model.hf_io.model_files import copy_model_files
from megatron_rpp.model.mtp_export import told_mtp
from megatron_rpp.observability.files import sync_path
from megatron_rpp.parallel.collectives import gather_errors, gather_objects, on_rank_0, words_of
from megatron_rpp.parallel.exit_codes import TakenOver

logger = logging.getLogger(__name__)

_LAST_WAIT_S = 5.0


class Checkpointer:
    """Writes the checkpoints of one run, one at a time. Every method but `abandon` is a collective of the whole job.

    Errors are OSError on every rank, with file and reason, or TakenOver; the checkpoints before stay as they are.
    """

    def __init__(
        self,
        run_dir: str | Path,
        source: str | Path,
        config: CheckpointConfig,
        *,
        fence: Fence | None = None,
        on_whole: Callable[[int], None] | None = None,
    ) -> None:
        """source: model directory whose config and tokenizer go into every checkpoint, so that it stands alone.

        fence: of rank 0, checked there before a checkpoint gets its name. on_whole: called there with the step, in
        the writing thread, once it has it.
        """
        self._run_dir, self._source = Path(run_dir), Path(source)
        self._config: CheckpointConfig = config
        self._fence, self._on_whole = fence, on_whole
        # Of its own: the thread must not meet the trainer's collectives. Files need no GPU, so it is gloo's.
        self._group = dist.new_group(backend="gloo")
        self._gather = partial(gather_objects, group=self._group)
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._is_taken_over = False  # rank 0 has found so, in the thread

    def check_fence(self) -> None:
        """Before anything else of the run directory is replaced. Raises TakenOver on every rank."""
        on_rank_0(lambda: self._fence.check() if self._fence else None, expect=TakenOver, raises=TakenOver)

    def save(
        self,
        policy: Model,
        optimizer: Optimizer,
        state: RunState,
        reference: Model | None = None,
        *,
        wait: bool = False,
        replace: bool = False,
    ) -> None:
        """Start the checkpoint of `state.step`, after the one before is whole; a whole one of that step is left as is.

        reference: whose FP8 scales are saved, too, where its recipe has a history. wait: return when it is whole, as
        without checkpoint.background. replace: also where that step has one.
        """
        self.wait()
        final, background = step_folder(self._run_dir, state.step), self._config.background and not wait
        if not replace and gather_objects(final.is_dir() and not damage(final, read=False))[0]:
            return
        folder = self._start(final)
        snapshot = take_snapshot(sharded_state(policy, optimizer, reference, is_loading=False), copy=background)
        dtype, generators = dtype_name(policy.config.params_dtype), rng_state()

        def write_small() -> None:
            save_rng(folder / rng_file(dist.get_rank()), generators)
            if dist.get_rank() == 0:
                write_common(snapshot, folder)
                copy_model_files(self._source, folder, dtype=dtype, changes=told_mtp(str(self._source), held=0))
                (folder / "run_state.json").write_text(json.dumps(state.to_json(), indent=1))

        self._thread = threading.Thread(
            target=self._run, args=(snapshot, folder, final, write_small), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not background:
            self.wait()

    def poll(self) -> None:
        """For a safe point of each step: raise what has befallen the checkpoint in the making, if anything has."""
        if self._thread is not None and all(gather_objects(not self._thread.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Until no checkpoint is in the making."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if failed := gather_errors(error):
            kind = TakenOver if any(gather_objects(self._is_taken_over)) else OSError
            raise kind(f"the checkpoint was not written: {failed}")

    def abandon(self) -> None:
        """For a rank that fails: a checkpoint in the making is given some seconds, as other ranks may be gone."""
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_S)

    def _start(self, final: Path) -> Path:
        """The empty folder in which `final` is made."""
        made: list[Path] = []
        on_rank_0(lambda: made.append(new_partial(final)))
        return gather_objects(made)[0][0]

    def _run(self, snapshot: Snapshot, folder: Path, final: Path, write_small: Callable[[], None]) -> None:
        """The thread: its collectives are all over its own group."""
        try:
            if dist.get_rank() == 0:
                remove_all(path for path in leftovers(self._run_dir, ("partial", "deleting")) if path != folder)
            write_snapshot(snapshot, folder, self._group)
            self._together(write_small)
            facts: FileFacts = {}
            self._together(lambda: facts.update(facts_of(folder, self._own_files(folder))))
            gathered = self._gather(facts)
            whole = {name: fact for each in gathered for name, fact in each.items()}
            on_rank_0(lambda: self._finish(folder, final, whole), expect=Exception, gather=self._gather)
        except Exception as error:  # whatever it is: `wait` tells it
            self._error = words_of(error, OSError)

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action` on every rank. Raises OSError on all where it failed on one."""
        error = None
        try:
            action()
        except Exception as caught:  # whatever it is: the other ranks wait to hear of it
            error = words_of(caught, OSError, ValueError)
        if failed := gather_errors(error, self._gather):
            raise OSError(failed)

    def _own_files(self, folder: Path) -> list[str]:
        """Each file is hashed by the rank that wrote it."""
        rank = dist.get_rank()
        own = [rng_file(rank), *written_by(rank, folder)]
        if rank == 0:
            others = [path.name for path in folder.iterdir()]
            own += [name for name in others if not name.startswith("rng-") and not name.endswith(".distcp")]
        return own

    def _finish(self, folder: Path, final: Path, facts: FileFacts) -> None:
        write_manifest(folder, facts)
        try:
            self._fence.check() if self._fence else None
        except TakenOver:
            self._is_taken_over = True
            raise
        put_in_place(folder, final)
        sync_path(final.parent.parent)
        prune(self._run_dir, self._config.keep, self._config.keep_every)
        logger.info("checkpoint %s is whole", final)
        if self._on_whole is not None:
            self._on_whole(int(final.name.removeprefix("step-")))
