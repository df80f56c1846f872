"""NCCL groups; tensor parallel ranks that share a GPU, and context parallel ones where there are two."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.parallel.collectives import gather_objects, sum_over
from megatron_rpp.parallel.local_launch import launch_local
from tests.gpu.site import Site
from tests.gpu.test_fp8_scales import first_step
from tests.gpu.test_layer_specs import logprobs_of, noise_of_bfloat16

TENSOR, CONTEXT = "tensor=2,sequence=1", "context=2"


def collectives_work(site: Site) -> None:
    x = torch.arange(3.0, device=site.parallel.device)
    assert torch.equal(sum_over(site.parallel.dp_group)(x), x) and gather_objects("a") == ["a"]


def two_ranks_are_one(site: Site, kind: str, layout: str) -> None:
    """Log-probs within the noise of bfloat16, and, each rank on its own GPU, the norm of the first gradient."""
    out = site.folder / "found.pt"
    command = [sys.executable, "-m", "tests.gpu.layout_worker", str(site.llama()), str(out), kind, layout]
    assert launch_local(command, 2, site.folder / "run") == 0
    found = torch.load(out)
    config = site.config(site.llama())
    config = replace(config, algorithm=replace(config.algorithm, kl_coef=0.0))
    _, bound = noise_of_bfloat16(site, config)
    difference = (logprobs_of(site, config) - found["logprobs"]).abs().mean().item()
    assert difference <= bound, f"mean difference {difference:.2e}, noise of bfloat16 {bound:.2e}"
    if kind != "shared":
        norm, expected = found["grad_norm"], first_step(site, config)[1]
        assert abs(norm / expected - 1) < 0.05, f"gradient norm {norm:.3e}, on one rank {expected:.3e}"


def test_a_group_of_one_gpu_is_nccls(site: Site) -> None:
    assert dist.get_backend(site.parallel.dp_group) == "nccl"
    collectives_work(site)


def test_tensor_ranks_with_sequence_parallelism_are_one(site: Site) -> None:
    """On one GPU over gloo, whose gathers and sums take its tensors: there forward alone."""
    two_ranks_are_one(site, "gpu" if torch.cuda.device_count() > 1 else "shared", TENSOR)


def test_context_parallel_ranks_are_one(site: Site) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU; NCCL refuses two ranks on it, and gloo cannot send GPU tensors round the ring")
    two_ranks_are_one(site, "gpu", CONTEXT)
