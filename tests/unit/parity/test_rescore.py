"""What is asked of which server, and how its reply is read."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_rpp.parity.rescore import MAX_RESPONSE, ScoreItem, assign, logprobs_of, rescore, share_of, shortened
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Deadline

A, B, C = "http://a:1", "http://b:1", "http://c:1"
ITEM = ScoreItem(row=0, ids=(5, 6, 7, 8), start=2)


def reply(*entries: list[Any]) -> dict[str, Any]:
    return {"meta_info": {"input_token_logprobs": list(entries)}}


def test_every_server_scores_something_where_there_are_fewer_responses() -> None:
    items = [ScoreItem(i, (1, 2), 1) for i in range(2)]
    assert [[i.row for i in given] for given in assign(items, (A, B, C)).values()] == [[0], [1], [0]]


def test_no_response_is_left_out_where_there_are_more() -> None:
    items = [ScoreItem(i, (1, 2), 1) for i in range(5)]
    assert sorted(i.row for given in assign(items, (A, B)).values() for i in given) == [0, 1, 2, 3, 4]


def test_no_server_is_asked_where_there_is_none() -> None:
    assert assign([ITEM], share_of((), 1, 2)) == {}


@pytest.mark.parametrize(("servers", "replicas"), [(64, 32), (5, 2), (2, 3), (1, 4), (3, 1)])
def test_replicas_ask_every_server_and_only_as_many_as_they_must(servers: int, replicas: int) -> None:
    urls = tuple(f"http://s:{i}" for i in range(servers))
    shares = [share_of(urls, replica, replicas) for replica in range(replicas)]
    assert {url for share in shares for url in share} == set(urls)
    assert all(shares), "a replica that asks nobody"
    assert sum(map(len, shares)) == max(servers, replicas)


def test_a_response_without_tokens_is_not_sent() -> None:
    assert assign([ScoreItem(0, (1, 2), 2)], (A,)) == {A: []}


def test_a_sequence_is_cut_to_what_the_server_takes() -> None:
    assert len(shortened(0, range(10), range(50), context_length=32).ids) == 24
    assert len(shortened(0, range(10), range(9000), context_length=32_000).ids) == 10 + MAX_RESPONSE
    assert shortened(0, range(40), range(5), context_length=32).ids == tuple(range(40))


def test_the_response_and_not_the_prompt_is_read_from_the_reply() -> None:
    assert logprobs_of(A, ITEM, reply([None, 6, None], [-0.5, 7, None], [-1.5, 8, None])) == [-0.5, -1.5]


def test_the_last_id_of_the_vocabulary_which_sglang_writes_as_0_is_accepted() -> None:
    assert logprobs_of(A, ITEM, reply([None, 6, None], [-0.5, 7, None], [-1.5, 0, None])) == [-0.5, -1.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        reply([-0.5, 7, None]),
        reply([None, 6, None], [-0.5, 9, None], [-1.5, 8, None]),
        reply([None, 7, None], [-1.5, 8, None]),
    ],
)
def test_log_probs_of_other_tokens_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match="no log-probs"):
        logprobs_of(A, ITEM, wrong)


def test_a_server_that_fails_does_not_hide_what_the_others_say() -> None:
    def post(url: str, endpoint: str, payload: dict[str, object], timeout_s: float) -> dict[str, object]:
        if url == A:
            raise RolloutError(f"{A}/generate: HTTP 503")
        assert payload["input_ids"] == [5, 6, 7, 8] and payload["logprob_start_len"] == 1
        return reply([None, 6, None], [-0.5, 7, None], [-1.5, 8, None])

    scored, failed = rescore(post, {A: [ITEM], B: [ITEM]}, Deadline("parity", 9.0))
    assert scored == {B: [(ITEM, [-0.5, -1.5])]}
    assert len(failed) == 1 and A in failed[0]


@pytest.mark.parametrize("odd", [{"meta_info": [1]}, {"meta_info": {"input_token_logprobs": [7, 8]}}])
def test_json_of_another_shape_is_that_servers_failure_alone(odd: dict[str, Any]) -> None:
    good = reply([None, 6, None], [-0.5, 7, None], [-1.5, 8, None])
    scored, failed = rescore(lambda url, *_: odd if url == A else good, {A: [ITEM], B: [ITEM]}, Deadline("parity", 9.0))
    assert list(scored) == [B]
    assert len(failed) == 1 and A in failed[0]


def test_all_responses_of_a_server_share_one_deadline() -> None:
    """Otherwise the ranks that wait would have to wait as often as there are responses."""
    timeouts: list[float] = []

    def post(url: str, endpoint: str, payload: dict[str, object], timeout_s: float) -> dict[str, object]:
        timeouts.append(timeout_s)
        time.sleep(0.15)
        return reply([None, 6, None], [-0.5, 7, None], [-1.5, 8, None])

    scored, failed = rescore(post, {A: [ITEM] * 9}, Deadline("parity", 0.4))
    assert 2 <= len(timeouts) <= 3 and timeouts == sorted(timeouts, reverse=True) and timeouts[0] <= 0.4
    assert scored == {} and failed == [f"not scored again: {A}/generate: {len(timeouts)} of 9 responses in 0.4 s"]
