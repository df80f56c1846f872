"""NCCL groups, and context parallel ranks where there are two GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.parallel.collectives import gather_objects, sum_over
from megatron_rpp.parallel.local_launch import launch_local
from tests.gpu.site import Site
from tests.gpu.test_layer_specs import logprobs_of, noise_of_bfloat16


def collectives_work(site: Site) -> None:
    x = torch.arange(3.0, device=site.parallel.device)
    assert torch.equal(sum_over(site.parallel.dp_group)(x), x) and gather_objects("a") == ["a"]


def assert_context_ranks_agree(site: Site, found: Path) -> None:
    """`found`: log-probs that tests.gpu.context_worker has written."""
    config = site.config(site.llama())
    _, bound = noise_of_bfloat16(site, config)
    difference = (logprobs_of(site, config) - torch.load(found)).abs().mean().item()
    assert difference <= bound, f"mean difference {difference:.2e}, noise of bfloat16 {bound:.2e}"


def test_a_group_of_one_gpu_is_nccls(site: Site) -> None:
    assert dist.get_backend(site.parallel.dp_group) == "nccl"
    collectives_work(site)


def test_context_parallel_ranks_give_the_log_probs_of_one(site: Site) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU; context parallelism needs two")
    out = site.folder / "context.pt"
    command = [sys.executable, "-m", "tests.gpu.context_worker", str(site.llama()), str(out), "gpu", "2"]
    assert launch_local(command, 2, site.folder / "run") == 0
    assert_context_ranks_agree(site, out)
