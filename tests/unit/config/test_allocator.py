"""Expandable segments: where they would break a run or a server."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rpp.config.allocator import check_allocator, for_server
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build
from megatron_rpp.config.preflight import check_host
from megatron_rpp.config.rollout import RolloutConfig

IPC = {"weight_sync.transports": ("broadcast", "ipc")}
GRAPHS = {"train.cuda_graphs": True}
ON = "max_split_size_mb:128,expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_ipc_is_refused_before_it_could_fail_in_the_middle_of_a_sync(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, name: str
) -> None:
    config = build({**IPC, "run.dir": str(tmp_path), "rollout.port": 0})
    with pytest.raises(ConfigError, match=f"{name}={ON} must go without expandable_segments: weight_sync.transports"):
        check_allocator(config, {name: ON})
    monkeypatch.setenv(name, ON)
    with pytest.raises(ConfigError, match="expandable_segments"):
        check_host(config, resume=False)


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": ON}),
        (IPC, {}),
        (IPC, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
        (GRAPHS, {}),
        (GRAPHS, {"PYTORCH_ALLOC_CONF": ON, "NCCL_GRAPH_REGISTER": "0"}),
    ],
)
def test_what_works_is_not_refused(settings: dict[str, Any], environment: dict[str, str]) -> None:
    check_allocator(build(settings), environment)


def test_a_run_without_servers_sends_nothing_that_could_not_be_sent() -> None:
    check_allocator(build(IPC), {"PYTORCH_ALLOC_CONF": ON}, syncs=False)


@pytest.mark.parametrize("registers", [{}, {"NCCL_GRAPH_REGISTER": "1"}])
def test_graphs_are_refused_where_nccl_would_register_what_lies_in_such_segments(registers: dict[str, str]) -> None:
    message = "PYTORCH_ALLOC_CONF=.* must go without expandable_segments: with train.cuda_graphs.*NCCL_GRAPH_REGISTER=0"
    for syncs in (True, False):
        with pytest.raises(ConfigError, match=message):
            check_allocator(build(GRAPHS), {"PYTORCH_ALLOC_CONF": ON, **registers}, syncs=syncs)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "A": "1"}, {"A": "1"}),
        ({"PYTORCH_ALLOC_CONF": ON}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}),
        ({"PYTORCH_ALLOC_CONF": " expandable_segments : true "}, {}),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
    ],
)
def test_a_server_that_releases_its_memory_has_none_where_its_memory_saver_cannot_reach(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    assert for_server(given, RolloutConfig(release_memory=True)) == expected
    assert for_server(given, RolloutConfig()) == given
