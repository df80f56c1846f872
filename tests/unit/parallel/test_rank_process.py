"""What a rank's process does beside its work."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from megatron_rpp.parallel.rank_process import left_out_of_collections


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_collections_begin_after_the_imports_and_pass_over_them_even_where_these_fail() -> None:
    imported: list[list[object]] = []
    with pytest.raises(ImportError), left_out_of_collections():
        assert not gc.isenabled()
        imported.append([])
        raise ImportError
    assert gc.isenabled()
    assert not any(each is imported for each in gc.get_objects()), "it would be looked at again"
