"""Which server takes a request: by tokens in flight, and by the beginnings of prompts that it has seen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_rpp.rollout.prefix_table import BLOCK, PrefixTable
from megatron_rpp.rollout.server_pool import ServerPool, Work
from megatron_rpp.rollout.shared_load import SharedLoad

HEADER = list(range(100, 100 + 4 * BLOCK))


def pool(count: int, shared: SharedLoad | None = None) -> ServerPool:
    session: Any = None
    return ServerPool([f"http://{i}" for i in range(count)], 60.0, session, shared)


def place(works: Sequence[Work], count: int = 3) -> list[str]:
    """The servers that take `works` while none of these ends."""

    async def never() -> None:
        await asyncio.Event().wait()

    async def run() -> list[str]:
        servers, taken, tasks = pool(count), [], []
        for work in works:
            server = servers.pick(work, [])
            taken.append(server.url)
            tasks.append(asyncio.create_task(servers.run(server, work, never())))
            await asyncio.sleep(0)  # it is in flight now
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not any(server.running for server in servers.left()), "a cancelled request is still counted"
        return taken

    return asyncio.run(run())


def test_load_is_tokens_and_not_requests() -> None:
    big, *small = [Work([1], 1000, 0), *(Work([i], 100, i) for i in range(2, 10))]
    taken = place([big, *small], count=2)
    assert taken == ["http://0", *["http://1"] * 8]


def test_a_replica_sees_what_others_have_in_flight_until_they_are_done_with_it() -> None:
    """Else a server that holds seven replicas' long answers would look idle to the eighth."""

    async def run() -> None:
        store, tasks = dist.HashStore(), []
        first, second, alone = pool(2, SharedLoad(store)), pool(2, SharedLoad(store)), pool(2)
        a, b = first.left()
        for i in (1, 2):
            tasks.append(asyncio.create_task(first.run(a, Work([i], 500, 0), asyncio.sleep(60))))
        await asyncio.sleep(0)
        work = Work([9], 100, 0)
        assert second.pick(work, []).url == b.url and alone.pick(work, []).url == a.url
        second.left()[1].failures = 11
        assert second.pick(work, []).url == a.url, "its own bad experience counts too"
        second.left()[1].failures = 0
        first.give_up(a, "dead")
        await asyncio.gather(*tasks, return_exceptions=True)
        assert SharedLoad(store).look([a.url, b.url]) == {a.url: 0, b.url: 0}
        assert second.pick(work, []).url == a.url

    asyncio.run(run())


def test_prompts_with_one_header_go_where_it_was_seen_but_no_further_than_one_request_ahead() -> None:
    works = [Work([*HEADER, i], 500, i) for i in range(9)]
    taken = place(works)
    assert taken[0] == taken[1], "the second one finds the header there"
    assert set(Counter(taken).values()) == {3}, "and in the end all servers have the same to do"


def test_two_families_of_prompts_keep_to_their_servers() -> None:
    families = [HEADER, [token + 1000 for token in HEADER]]
    works = [Work([*families[i % 2], i], 500, 0) for i in range(8)]
    assert place(works, count=2) == ["http://0", "http://1"] * 4


def test_a_short_common_beginning_does_not_count() -> None:
    works = [Work([*HEADER[: BLOCK - 1], i, *range(BLOCK)], 500, i) for i in range(3)]
    assert len(set(place(works))) == 3
    long_tail = [Work([*HEADER[:BLOCK], *range(i * 1000, i * 1000 + 4 * BLOCK)], 500, i) for i in range(3)]
    assert len(set(place(long_tail))) == 3, "one block of five is not worth a request of imbalance"


def test_a_server_that_has_failed_the_request_is_not_preferred_for_its_prefix() -> None:
    async def run() -> None:
        servers, work = pool(2), Work([*HEADER, 1], 500, 0)
        first = servers.pick(work, [])
        await servers.run(first, work, asyncio.sleep(0))
        assert servers.pick(work, []) is first
        assert servers.pick(work, [first.url]) is not first
        servers.give_up(first, "dead")
        assert servers.pick(work, []) is not first

    asyncio.run(run())


def test_the_longest_beginning_is_in_whole_blocks() -> None:
    table = PrefixTable()
    table.add("a", HEADER)
    table.add("b", HEADER[: 2 * BLOCK + 3])
    assert table.known([*HEADER[: 3 * BLOCK], 7]) == {"a": 3 * BLOCK, "b": 2 * BLOCK}
    assert table.known([1, *HEADER]) == {} == table.known(HEADER[: BLOCK - 1])
