"""Megatron distributed checkpoints of a run: complete or absent, the newest few kept.

RUN_DIR/checkpoints/step-000020/ holds Megatron's `dist_checkpointing` files (model and optimizer, at any
layout), config and tokenizer of the model, and run_state.json. A directory gets that name only when everything
in it has been written.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.torch_adam import allocate_state, give_steps, load_state
from megatron_rpp.device import dtype_name
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.model.build import Model
from megatron_rpp.model.hf_io.model_files import copy_model_files
from megatron_rpp.model.mtp_export import told_mtp
from megatron_rpp.model.save_hf import make_empty
from megatron_rpp.parallel.collectives import on_rank_0

_STEP = re.compile(r"step-(\d+)")
# The default sharding of the distributed optimizer cannot be resharded by dist_checkpointing.
# Experts have an optimizer of their own in Megatron; its place in the chain is no part of a tensor's name.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = _complete(Path(run_dir))
    return found[-1] if found else None


def save_checkpoint(
    run_dir: str | Path, policy: Model, optimizer: Optimizer, state: RunState, keep: int, source: str | Path
) -> Path:
    """Write the checkpoint of `state.step` and drop all but the newest `keep`. A collective over the whole job.

    Config and tokenizer come from the model directory `source`, so that the checkpoint stands alone: it
    converts to Hugging Face form, and another run can start from it.

    Raises OSError on every rank where rank 0 could not write.
    """
    final = _folder(Path(run_dir)) / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    on_rank_0(lambda: make_empty(partial))
    dist_checkpointing.save(_sharded(policy, optimizer, is_loading=False), str(partial))

    def finish() -> None:
        dtype = dtype_name(policy.config.params_dtype)
        copy_model_files(Path(source), partial, dtype=dtype, changes=told_mtp(str(source), held=0))
        (partial / "run_state.json").write_text(json.dumps(state.to_json(), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _complete(Path(run_dir))[:-keep]:
            shutil.rmtree(old)

    on_rank_0(finish, expect=(OSError, ValueError))
    return final


def load_checkpoint(path: Path, policy: Model, optimizer: Optimizer) -> RunState:
    """Load model, optimizer and schedule in place; the layout may differ from the one that saved."""
    allocate_state(optimizer.megatron)
    loaded = dist_checkpointing.load(_sharded(policy, optimizer, is_loading=True), str(path))
    for key, chunk in _chunk_keys(policy):
        chunk.load_state_dict(loaded[key])
    load_state(optimizer.megatron, loaded["optimizer"])
    state = RunState.from_json(json.loads((path / "run_state.json").read_text()))
    optimizer.schedule.load_state_dict(state.schedule)
    return state


def _sharded(policy: Model, optimizer: Optimizer, *, is_loading: bool) -> dict[str, Any]:
    give_steps(optimizer.megatron)
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _chunk_keys(policy)}
    state["optimizer"] = optimizer.megatron.sharded_state_dict(state, is_loading=is_loading, metadata=_METADATA)
    return state


def _chunk_keys(policy: Model) -> list[tuple[str, Any]]:
    """The bare models inside DDP under Megatron's own keys: `model`, or `model0`, ... for virtual stages."""
    models = [chunk.module for chunk in policy.chunks]
    if len(models) == 1:
        return [("model", models[0])]
    return [(f"model{i}", model) for i, model in enumerate(models)]


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _complete(run_dir: Path) -> list[Path]:
    folders = [p for p in _folder(run_dir).glob("step-*") if _STEP.fullmatch(p.name)]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))
