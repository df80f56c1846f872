"""Responses that move between replicas for balance change nothing that is learnt, and get lost nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.balance_worker import LAYOUTS, MODES, greedy_reward_of, responses, reward_of
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import save_tiny

RANKS = 4
Found = dict[tuple[str, str], list[dict[str, Any]]]
CASES = [(name, mode) for name, layout in LAYOUTS.items() for mode in MODES if mode == "packed" or layout.context == 1]
REFERENCE = ("dp4", "padded")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("balance")
    run_ranks("tests.distributed.balance_worker", [str(save_tiny("llama", out)), str(out)], RANKS, out)
    return out


@pytest.fixture(scope="module")
def found(out: Path) -> Found:
    """(layout, mode) -> what each rank has."""
    return {
        (name, mode): [torch.load(out / f"{name}-{mode}-{rank}.pt", weights_only=False) for rank in range(RANKS)]
        for name, mode in CASES
    }


def leaders(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank for rank in ranks if rank["is_leader"]]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_response_is_on_one_replica_with_its_reward_baseline_and_mini_batch(
    found: Found, case: tuple[str, str]
) -> None:
    everyone = responses()
    held = []
    for rank in leaders(found[case]):
        share = rank["share"]
        rows = list(zip(share.minibatch_ids, share.rollouts, share.rewards, share.greedy_rewards, strict=True))
        for minibatch, rollout, reward, greedy in rows:
            assert (reward, greedy) == (reward_of(rollout), greedy_reward_of(rollout))
            assert minibatch == everyone.index(rollout) // 8
        numbers = [everyone.index(rollout) for rollout in share.rollouts]
        assert numbers == sorted(numbers)
        held += numbers
    assert sorted(held) == list(range(len(everyone)))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_all_ranks_of_a_replica_hold_the_same_rows(found: Found, case: tuple[str, str]) -> None:
    leader_of = {rank["replica"]: rank for rank in leaders(found[case])}
    assert all(rank["share"] == leader_of[rank["replica"]]["share"] for rank in found[case])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_replicas_are_balanced_by_moving_responses_and_padded_ones_keep_theirs(
    found: Found, layout: str
) -> None:
    (packed, *others) = leaders(found[layout, "packed"])
    replicas = 1 + len(others)
    in_turn = [response for response in responses() if response.group_id % replicas == 0]
    assert packed["share"].rollouts != in_turn
    if layout != "cp2_dp2":
        padded = leaders(found[layout, "padded"])[0]
        assert padded["share"].rollouts == in_turn
        assert packed["metrics"]["train/dp_imbalance"] < padded["metrics"]["train/dp_imbalance"] / 4
    assert packed["metrics"]["train/dp_imbalance"] < (0.05 if replicas == 2 else 0.15)


@pytest.mark.parametrize("case", [case for case in CASES if case != REFERENCE], ids="-".join)
def test_moving_packing_and_layout_change_neither_advantages_nor_loss_nor_weights(
    found: Found, case: tuple[str, str]
) -> None:
    expected, ranks = found[REFERENCE], found[case]
    wanted, advantages = (_advantages(leaders(each)) for each in (expected, ranks))
    for one, other in zip(wanted, advantages, strict=True):
        assert torch.tensor(one) == pytest.approx(torch.tensor(other), abs=1e-5)
    stats = expected[0]["stats"]
    assert stats["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and stats["grad_norm"] > 0.01
    for name, value in stats.items():
        if name != "train/padding_waste":
            assert ranks[0]["stats"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    before, after = _weights(expected), _weights(ranks)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=2e-6, msg=f"{name}: {case}")


def test_packing_wastes_little_where_padding_wastes_much(found: Found) -> None:
    waste = {mode: found["tp2_sp_dp2", mode][0]["stats"]["train/padding_waste"] for mode in MODES}
    assert waste["packed"] < 0.05 < 0.15 < waste["padded"]


@pytest.mark.parametrize("way", ["without_rewards", "unpicklable"])
def test_a_leader_that_fails_is_named_on_every_rank(out: Path, way: str) -> None:
    told = [json.loads((out / f"failures-{rank}.json").read_text())[way] for rank in range(RANKS)]
    expected = {"without_rewards": "one reward a response", "unpicklable": "pickle"}[way]
    assert len(set(told)) == 1 and expected in told[0] and "rank 2: " in told[0]


def _advantages(ranks: list[dict[str, Any]]) -> list[list[float]]:
    """Of each response, by its number."""
    everyone = responses()
    rows = {
        everyone.index(rollout): row
        for rank in ranks
        for rollout, row in zip(rank["share"].rollouts, rank["advantages"], strict=True)
    }
    return [rows[number] for number in sorted(rows)]


def _weights(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of all stages."""
    return {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
