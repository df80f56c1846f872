"""Directories of random weights, and a trainer's syncs of them to running servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.integration.sync_worker import Job, write_jobs
from tests.support.rank_server import run_ranks

RANKS = 4  # of every layout: one launch for all
Make = Callable[[], PreTrainedModel]


def write_weights(make: Make, seed: int, folder: Path) -> str:
    """A random model, no two seeds alike in any tensor; the directory."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():  # norms and biases start alike
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def change_a_tenth(source: str, folder: Path) -> str:
    """A copy of the directory `source` in which a tenth of the values has changed, and in layer 1 none."""
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(source) / "config.json").read_bytes())
    torch.manual_seed(1)
    changed = tensors_of(source)
    for name, tensor in changed.items():
        if ".layers.1." not in name:
            tensor += (torch.rand_like(tensor) < 0.1) * torch.randn_like(tensor)
            tensor.view(-1)[-1] += 1  # of a small one, too
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def tensors_of(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def launch(jobs: list[Job], out: Path) -> None:
    """Run them all; what they note is in `out`."""
    write_jobs(jobs, out / "jobs.json")
    run_ranks("tests.integration.sync_worker", [str(out / "jobs.json"), str(out)], RANKS, out)
