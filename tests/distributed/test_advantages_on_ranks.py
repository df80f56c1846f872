"""The global batch on four gloo ranks, unevenly: every rank gets the advantages of one process, in every preset."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.presets import PRESETS
from tests.distributed.advantages_worker import SEEDS, advantages, edges, split_batch
from tests.support.rank_server import run_ranks

RANKS = 4


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Tensor]]]:
    """Rank -> seed -> preset -> its rows' advantages."""
    out = tmp_path_factory.mktemp("advantages")
    run_ranks("tests.distributed.advantages_worker", [json.dumps(RANKS), json.dumps(str(out))], RANKS, out)
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_four_ranks_get_the_advantages_of_one_process(
    on_ranks: list[dict[int, dict[str, Tensor]]], seed: int, preset: str
) -> None:
    pieces = split_batch(seed, RANKS)
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    expected = advantages(whole)[preset]
    found = torch.cat([rank[seed][preset] for rank in on_ranks])
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_splits_hold_an_empty_rank_and_one_without_response_tokens() -> None:
    for seed in SEEDS:
        cuts = edges(seed, RANKS)
        assert len(cuts) == RANKS + 1 and 0 in (b - a for a, b in itertools.pairwise(cuts))
        last = split_batch(seed, RANKS)[-1]
        assert len(last["rewards"]) > 0 and last["loss_mask"].sum() == 0
