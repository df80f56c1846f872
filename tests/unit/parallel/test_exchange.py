"""Values between ranks by a deadline: who is missing is named, on every rank that is there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rpp.parallel import exchange
from megatron_rpp.parallel.exchange import Exchange, RanksMissing

RANKS = 3


@pytest.fixture
def stores() -> list[dist.Store]:
    """Each rank's connection to one store on loopback."""
    long = timedelta(seconds=30)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=long)
    return [server, *(dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=long) for _ in range(RANKS - 1))]


def on_ranks(stores: list[dist.Store], ranks: list[int], timeout_s: float, name: str = "test") -> dict[int, object]:
    """What `gather` gives or raises on each of `ranks`; the others stay away."""

    def one(rank: int) -> object:
        try:
            return Exchange(stores[rank], rank, RANKS, name).gather("lunch", f"from {rank}", timeout_s)
        except RanksMissing as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def test_every_rank_gets_all_values_in_rank_order(stores: list[dist.Store]) -> None:
    expected = [f"from {rank}" for rank in range(RANKS)]
    assert on_ranks(stores, [0, 1, 2], 20) == {rank: expected for rank in range(RANKS)}


def test_a_missing_rank_is_named_on_every_other(stores: list[dist.Store]) -> None:
    found = on_ranks(stores, [0, 2], 0.5)
    for error in found.values():
        assert isinstance(error, RanksMissing) and error.ranks == (1,)
        assert "lunch: rank 1 did not answer within 0.5 s" in str(error)


def test_a_missing_rank_0_is_named_although_it_collects(
    stores: list[dist.Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "GRACE_S", 0.2)
    found = on_ranks(stores, [1, 2], 0.3)
    assert all(isinstance(error, RanksMissing) and error.ranks == (0,) for error in found.values())


def test_calls_follow_each_other_and_leave_no_keys_behind(stores: list[dist.Store]) -> None:
    parties = [Exchange(stores[rank], rank, RANKS, "many") for rank in range(RANKS)]
    barrier = threading.Barrier(RANKS)

    def one(rank: int) -> list[list[int]]:
        found = [parties[rank].gather("", 10 * i + rank, 20) for i in range(50)]
        barrier.wait(20)
        return found

    before = stores[0].num_keys()
    with ThreadPoolExecutor(RANKS) as pool:
        for found in pool.map(one, range(RANKS)):
            assert found == [[10 * i + rank for rank in range(RANKS)] for i in range(50)]
    assert stores[0].num_keys() <= before + 2


def test_two_exchanges_on_one_store_do_not_mix(stores: list[dist.Store]) -> None:
    a, b = (on_ranks(stores, [0, 1, 2], 20, name) for name in ("a", "b"))
    assert a == b
