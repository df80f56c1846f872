"""The responses that a step trains on: to exactly the next prompts, or as the section `schedule` says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_rpp.config.data import DataConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import MOST_ROUNDS
from megatron_rpp.experience.types import Rollout
from megatron_rpp.observability.rollouts import Skipped
from megatron_rpp.parallel.collectives import gather_objects, words_of
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.schedule.quota import quota_of
from megatron_rpp.rollout.schedule.sampling_try import Group
from megatron_rpp.rollout.schedule.scheduler import Leaders, Scheduler
from megatron_rpp.rollout.schedule.settlement import Report, Settlement, settle
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.schedule.usage import usage_metrics
from megatron_rpp.session import Session


@dataclass(frozen=True)
class Collected:
    """One replica's responses of a step, ordered by (group, sample), which may be none; the rest is of all replicas."""

    rollouts: list[Rollout]
    rewards: list[float] | None  # where groups were judged on the way
    metrics: dict[str, float]
    skipped: list[Skipped] = field(default_factory=list)  # prompts that were used up without training


@dataclass(frozen=True)
class _Round:
    """One draw of a step, and what came of it."""

    step: Step
    settlement: Settlement
    reports: list[Report]  # of all leaders
    groups: list[Group]  # of this replica, to be trained on

    @property
    def skipped(self) -> list[Skipped]:
        first, draws = self.step.first_group_id, self.step.draws
        return [Skipped(draws[i].prompt.id, first + i, r) for i, r in sorted(self.settlement.skipped.items())]


def collect(s: Session, step: int) -> Collected:
    """Sample a step, and tell the prompt source what became of each prompt. A collective over the whole job.

    Raises RolloutError where sampling fails, on every rank what the reward raises, and ConfigError where no group
    is left to train on.
    """
    if s.config.schedule.is_plain:
        rollouts = s.rollout_engine.generate(s.prompt_source.next_batch(), s.sampling(step), s.reporter.progress)
        flights = [flight for each in gather_objects(s.rollout_engine.flights) for flight in each]
        return Collected(rollouts, None, usage_metrics(flights, [flight.end for flight in flights]))
    rounds = [_sample_round(s, step, [])]
    while not rounds[-1].settlement.kept:
        if len(rounds) == MOST_ROUNDS:
            # Without it a resumed run would draw the same prompts again, and come to the same end.
            s.save(step, wait=True, replace=True)
            raise ConfigError(_nothing_left(rounds, s.config.data))
        rounds.append(_sample_round(s, step, rounds))
    groups = rounds[-1].groups
    return Collected(
        rollouts=[rollout for group in groups for rollout in group.rollouts],
        rewards=[r for group in groups for r in group.rewards or ()] if s.config.schedule.dynamic_sampling else None,
        metrics=_metrics(s, rounds),
        skipped=[skipped for each in rounds for skipped in each.skipped],
    )


def _sample_round(s: Session, step: int, before: Sequence[_Round]) -> _Round:
    """One draw of `step`, sampled and settled. Its groups' ids, from which seeds derive, go on from those `before`."""
    quota = quota_of(s.config)
    wanted = Step(
        name=f"{step}.{len(before)}",
        draws=s.prompt_source.peek(quota.draws),
        quota=quota,
        sampling=s.sampling(step),
        first_group_id=sum(len(each.step.draws) for each in before),
        began=before[0].step.began if before else time.monotonic(),
        tokens_before=sum(report.tokens for each in before for report in each.reports),
    )
    reports, groups = _sample(s, wanted)
    settlement = settle(reports, quota.groups, wanted.awaited)
    positions = [draw.position for draw in wanted.draws]
    s.prompt_source.settle(
        positions[: settlement.drawn],
        {positions[i] for i in settlement.deferred},
        {positions[i] for i in (*settlement.surplus, *settlement.unasked)},
    )
    return _Round(wanted, settlement, reports, [groups[i] for i in settlement.kept if i in groups])


def _sample(s: Session, wanted: Step) -> tuple[list[Report], dict[int, Group]]:
    """(the reports of all leaders, this replica's groups that may be trained on, by index in the draw)."""
    leaders = Leaders(s.parallel.store, partial(gather_objects, group=s.parallel.dp_group), s.parallel.dp_size)
    reward = s.reward if wanted.quota.is_judged else None
    scheduler = None
    if s.parallel.is_replica_leader:
        scheduler = Scheduler(wanted, s.config.rollout, leaders, reward, s.reporter.progress)

    def sample(client: RecordedClient) -> tuple[Report, dict[int, Group], Exception | None]:
        assert scheduler is not None, "only leaders sample"
        return scheduler.run(client)

    report, groups, error = s.rollout_engine.with_retries(sample)
    words = words_of(error) if error is not None else None
    told = gather_objects((report, words, s.parallel.is_replica_leader))
    if s.parallel.rank == 0 and scheduler is not None:
        scheduler.forget()  # all have ended
    if error is not None:
        raise error
    if failed := [f"rank {rank}: the reward failed: {text}" for rank, (_, text, _) in enumerate(told) if text]:
        raise RuntimeError(failed[0])
    return [each for each, _, is_leader in told if is_leader], groups


def _nothing_left(rounds: Sequence[_Round], data: DataConfig) -> str:
    tried = ", ".join(str(len(each.settlement.skipped)) for each in rounds)
    return (
        f"schedule.dynamic_sampling left out every group in {len(rounds)} draws of one step (of {tried} prompts): the "
        "responses to each prompt all earn the same reward. Raise schedule.max_draws, rollout.num_prompts or "
        f"algorithm.num_samples_per_prompt, filter {'data.sources' if data.sources else 'data.train'} by pass rate, or "
        "look at the reward; a resumed run goes on with other prompts"
    )


def _metrics(s: Session, rounds: Sequence[_Round]) -> dict[str, float]:
    """Counts are of groups, over all replicas and draws; the rest is of the last draw."""
    middle = (s.config.reward.correct + s.config.reward.wrong) / 2
    skipped = [each.reward for round_ in rounds for each in round_.skipped]
    solved = sum(reward > middle for reward in skipped)
    reports, kept = rounds[-1].reports, set(rounds[-1].settlement.kept)
    ends = [end for report in reports for index, end in report.complete.items() if index in kept]
    return {
        "rollout/groups": float(len(kept)),
        "rollout/drawn": float(sum(each.settlement.drawn for each in rounds)),
        "rollout/deferred": float(sum(len(each.settlement.deferred) for each in rounds)),
        "rollout/aborted": float(sum(report.aborted for each in rounds for report in each.reports)),
        "rollout/skipped": float(len(skipped)),
        "rollout/skipped_solved": float(solved),
        "rollout/skipped_unsolved": float(len(skipped) - solved),
        **usage_metrics([flight for report in reports for flight in report.flights], ends),
    }
