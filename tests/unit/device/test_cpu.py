"""The CPU stand-ins answer Megatron's CUDA calls and leave the rest of torch as it is."""

from __future__ import annotations

import pytest
import torch

import megatron_rpp.device

pytestmark = pytest.mark.skipif(megatron_rpp.device.has_cuda(), reason="the stand-ins are inert where CUDA exists")


def test_cuda_device_arguments_mean_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0").device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_device_context_still_reaches_the_factory_functions() -> None:
    # transformers builds models under `with torch.device("meta")`; without this it loads random weights.
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.zeros(2).is_meta


def test_tensor_type_reads_as_megatron_compares_it() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64


def test_rng_state_round_trips_through_the_cuda_names() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
