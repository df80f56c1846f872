"""Skips all where there is no CUDA GPU, and only there: without Transformer Engine on a GPU host tests fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp import device
from tests.gpu.site import Site, clean, open_site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device.has_cuda():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
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
