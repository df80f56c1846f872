"""What is asked of torch's CUDA allocator, with a stand-in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build
from megatron_rpp.device import memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(memory, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", found.append)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ["expandable_segments:True"]), ({"weight_sync.transports": ("ipc",)}, []), ({"train.cuda_graphs": True}, [])],
)
def test_segments_grow_where_that_is_safe(asked: list[str], settings: dict[str, Any], expected: list[str]) -> None:
    memory.prepare_allocator(build(settings), {})
    assert asked == expected


def test_a_rank_whose_environment_contradicts_is_refused(asked: list[str]) -> None:
    config = build({"weight_sync.transports": ("ipc",)})
    with pytest.raises(ConfigError, match="PYTORCH_ALLOC_CONF=expandable_segments:True must go without"):
        memory.prepare_allocator(config, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert asked == []


def test_torch_has_the_functions_that_gpus_are_asked_by() -> None:
    """Private or renamed ones would fail on a GPU alone."""
    names = ("max_memory_allocated", "memory_allocated", "reset_peak_memory_stats")
    assert all(callable(getattr(torch.cuda, name)) for name in names)
    assert callable(torch.cuda.memory._set_allocator_settings)


def test_nothing_is_counted_on_cpu_and_host_memory_is_plain() -> None:
    memory.forget_peak()
    assert memory.memory_use() is None
    block = memory.host_block(64)
    assert block.shape == (64,) and block.dtype == torch.uint8 and not block.is_pinned()
