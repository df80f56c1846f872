"""Skips all where there is no CUDA GPU, and only there: without Transformer Engine on a GPU host tests fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp import device
from tests.gpu.site import Site, clean, open_site

ORDER = (  # the most telling first, for a run that is cut off
    "test_layer_specs",
    "test_families",
    "test_fp8_bytes",
    "test_fp8_served",
    "test_fp8_training",
    "test_colocated",
    "test_logprobs",
    "test_fp8_checkpoint",
    "test_fp8_scales",
    "test_offload",
    "test_groups",
    "test_speed",
    "test_profile",
)
LONGEST = "test_the_loop_trains_with_a_server_on_its_own_gpu"  # minutes, most of them the server's start: at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    assert {item.path.stem for item in ours} <= set(ORDER), "a file of tests has no place in ORDER"
    places = iter(sorted(ours, key=lambda item: (item.name == LONGEST, ORDER.index(item.path.stem))))
    items[:] = [next(places) if here in item.path.parents else item for item in items]
    if not device.has_cuda():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("gpu"), is_tiny=False) as site:
        yield site


@pytest.fixture
def site(job: Site, tmp_path: Path) -> Iterator[Site]:
    """The one job of all tests, with a folder of the test's own."""
    yield replace(job, folder=tmp_path)
    clean()


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare bits: Transformer Engine's attention, as it is made, reads that its backward is to sum in
    one order. Not for others: that costs memory and speed (docs/gpu.md)."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
