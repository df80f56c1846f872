"""Ranks killed while they write a checkpoint: a resume always finds a whole one, the new or the one before."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from megatron_rpp.checkpoint.files import damage
from megatron_rpp.checkpoint.folders import latest_checkpoint, leftovers
from tests.support.tiny_models import save_tiny

KILLS = 20


def _states(path: Path) -> list[tuple[int, int, str]]:
    lines = (line.split() for line in path.read_text().splitlines())
    return [(int(rank), int(step), digest) for rank, step, digest in lines]


def test_killed_twenty_times_in_a_checkpoint_every_resume_finds_a_whole_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    command = [sys.executable, "-m", "tests.distributed.checkpoint_kill_worker", str(tmp_path / "llama"), str(tmp_path)]
    done = subprocess.run([*command, str(KILLS)], capture_output=True, text=True, timeout=900)
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("logs/*"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    wanted = {(rank, step): digest for rank, step, digest in _states(tmp_path / "undisturbed.txt")}
    resumed = _states(tmp_path / "killed.txt")
    assert len(resumed) == 2 * (KILLS + 1)
    for rank, step, digest in resumed:
        assert wanted[rank, step] == digest, f"rank {rank} resumed something else than the state of step {step}"
    reached = [step for rank, step, _ in resumed if rank == 0]
    advances = {after - before for before, after in pairwise(reached)}
    assert advances == {0, 1}, "kills must fall before and after the moment at which a checkpoint gets its name"
    newest = latest_checkpoint(tmp_path / "killed")
    assert newest is not None and not damage(newest, read=True)
    assert len(leftovers(tmp_path / "killed")) < KILLS / 4, "what killed jobs leave is not deleted"
