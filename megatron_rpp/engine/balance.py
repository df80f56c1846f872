"""Which optimizer step trains a response, and on which replica.

The first depends on nothing but the responses: all of them are numbered by (group, sample), and cut into mini-batches
in that order. The second is free, since losses and advantages are sums over all replicas: where microbatches are
packed, the responses of each mini-batch are dealt to the replicas anew, so that none waits long for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.balance import imbalance, partition
from megatron_rpp.experience.types import Rollout
from megatron_rpp.model.cost import sequence_cost
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.parallel.collectives import from_replica_leader
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.object_exchange import exchange_objects, gather_outcomes


@dataclass
class ReplicaShare:
    """One replica's responses of a step; of each, what it earned, and the mini-batch that trains it."""

    rollouts: list[Rollout]
    rewards: list[float]
    greedy_rewards: list[float] | None
    minibatch_ids: list[int] = field(default_factory=list)


class Size(NamedTuple):
    """A response, as far as the deal depends on it."""

    group_id: int
    tokens: int  # prompt and response


@dataclass(frozen=True)
class Deal:
    """The responses of all replicas by number, each list as long as they are many."""

    source: list[tuple[int, int]]  # (replica, its row there) before the deal
    owner: list[int]  # the replica that trains it
    minibatch: list[int]
    imbalance: float  # of predicted cost: the largest replica over the mean, less 1; mean over the mini-batches


class _Row(NamedTuple):
    number: int
    rollout: Rollout
    reward: float
    greedy_reward: float | None
    minibatch: int


def balance(
    share: ReplicaShare, config: Config, hf: HFConfig, parallel: ParallelContext
) -> tuple[ReplicaShare, dict[str, float]]:
    """(what this replica trains, ordered by (mini-batch, group, sample); metrics). A collective over the whole job.

    Without packing (train.micro_batch_tokens = 0) each replica keeps what it has sampled. The metric
    train/dp_imbalance counts no padding. An exception on one replica is raised on all ranks.
    """
    deal, arrived = from_replica_leader(parallel, lambda: _exchange(share, config, hf, parallel))
    me = parallel.dp_rank
    kept = [i for i, (replica, _) in enumerate(deal.source) if replica == me == deal.owner[i]]
    rows = sorted([*(_row(share, deal, i) for i in kept), *arrived], key=lambda row: row.number)
    balanced = ReplicaShare(
        rollouts=[row.rollout for row in rows],
        rewards=[row.reward for row in rows],
        greedy_rewards=None if share.greedy_rewards is None else [row.greedy_reward for row in rows],  # type: ignore[misc]
        minibatch_ids=[row.minibatch for row in rows],
    )
    return balanced, {"train/dp_imbalance": deal.imbalance}


def deal_out(sizes: Sequence[Sequence[Size]], batch_size: int, cost: Callable[[int], float], *, may_move: bool) -> Deal:
    """Number the responses of every replica, cut them into mini-batches and, if they may move, balance each of these.

    Of N responses number i belongs to mini-batch i * n // N, of n = N // batch_size; so which ones train together
    depends neither on the replicas nor on lengths.
    """
    places = [(replica, row) for replica, held in enumerate(sizes) for row in range(len(held))]
    source = sorted(places, key=lambda place: (sizes[place[0]][place[1]].group_id, place))
    count = max(1, len(source) // batch_size)
    minibatch = [i * count // len(source) for i in range(len(source))]
    costs = [cost(sizes[replica][row].tokens) for replica, row in source]
    owner = [replica for replica, _ in source]
    imbalances = []
    for j in range(count):
        numbers = [i for i, of in enumerate(minibatch) if of == j]
        if may_move:
            _balance(numbers, costs, owner, len(sizes))
        imbalances.append(imbalance(_loads(numbers, costs, owner, len(sizes))))
    return Deal(source, owner, minibatch, sum(imbalances) / count)


def _balance(numbers: Sequence[int], costs: Sequence[float], owner: list[int], replicas: int) -> None:
    """Set the `owner` of a mini-batch's responses, if that helps; a part goes to whom most of it belongs already."""
    parts = [[numbers[i] for i in part] for part in partition([costs[i] for i in numbers], replicas)]
    if max(sum(costs[i] for i in part) for part in parts) >= max(_loads(numbers, costs, owner, replicas)):
        return
    there = {
        (part, replica): sum(costs[i] for i in parts[part] if owner[i] == replica)
        for part in range(replicas)
        for replica in range(replicas)
    }
    new_owners: dict[int, int] = {}
    for part, replica in sorted(there, key=lambda pair: (-there[pair], pair)):
        if part not in new_owners and replica not in new_owners.values():
            new_owners[part] = replica
    for part, replica in new_owners.items():
        for i in parts[part]:
            owner[i] = replica


def _loads(numbers: Sequence[int], costs: Sequence[float], owner: Sequence[int], replicas: int) -> list[float]:
    """What the responses `numbers` cost each replica."""
    loads = [0.0] * replicas
    for i in numbers:
        loads[owner[i]] += costs[i]
    return loads


def _exchange(share: ReplicaShare, config: Config, hf: HFConfig, parallel: ParallelContext) -> tuple[Deal, list[_Row]]:
    """On the leaders: the deal, the same for all of them, and the rows that this replica gets from others."""
    is_packed = config.train.micro_batch_tokens > 0
    sizes = gather_outcomes(lambda: _sizes(share), parallel.dp_group)
    deal = deal_out(sizes, config.train.batch_size, sequence_cost(hf), may_move=is_packed)
    moving = [i for i, owner in enumerate(deal.owner) if owner != deal.source[i][0]]
    if not moving:
        return deal, []
    outgoing: dict[int, list[_Row]] = {}
    for i in moving:
        if deal.source[i][0] == parallel.dp_rank:
            outgoing.setdefault(deal.owner[i], []).append(_row(share, deal, i))
    arrived = exchange_objects(outgoing, parallel.dp_group, parallel.device)
    return deal, [row for rows in arrived.values() for row in rows]


def _sizes(share: ReplicaShare) -> list[Size]:
    rollouts, greedy = share.rollouts, share.greedy_rewards
    assert len(share.rewards) == len(rollouts), "one reward a response"
    assert greedy is None or len(greedy) == len(rollouts), "one baseline a response"
    return [Size(r.group_id, len(r.prompt.token_ids) + len(r.response_ids)) for r in rollouts]


def _row(share: ReplicaShare, deal: Deal, number: int) -> _Row:
    row = deal.source[number][1]
    greedy = None if share.greedy_rewards is None else share.greedy_rewards[row]
    return _Row(number, share.rollouts[row], share.rewards[row], greedy, deal.minibatch[number])
