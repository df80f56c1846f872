"""What over-sampling does to a step's sampling where nothing else counts: the scheduling code on a clock that jumps.

A response takes as many units of time as the record says it has tokens, whatever else runs: servers with free slots,
whose decode step takes as long for one request as for many. No machine's load is in the result.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from benchmarks.long_cot_lengths import MODES, PROMPTS, SAMPLES, Lengths
from megatron_rpp.config.fields import build
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.schedule.quota import Counts, Quota, quota_of
from megatron_rpp.rollout.schedule.sampling_try import Group, SamplingTry
from megatron_rpp.rollout.schedule.settlement import Report, settle
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.schedule.tally import Tally

_POLL = 100.0  # tokens of time
_SAMPLING = SamplingParams(SAMPLES, 1, 1.0, 1.0, (), seed=0)


class _JumpingSelector(selectors.SelectSelector):
    """Its clock goes on at once to what the loop would wait for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        assert ready or timeout is not None, "the loop waits for ever"
        self.now += (timeout or 0.0) if not ready else 0.0
        return ready


def model_part(lengths: Lengths, steps: int) -> dict[str, dict[str, float]]:
    """By mode: mean time of a step's sampling over that of the plain mode; share of the tokens sampled in vain."""
    found = {mode: run_mode(lengths, settings, steps) for mode, settings in MODES.items()}
    return {
        "model_rollout_ratio": {mode: time / found["plain"][0] for mode, (time, _) in found.items()},
        "model_wasted_tokens": {mode: wasted for mode, (_, wasted) in found.items()},
    }


def print_model(found: Mapping[str, Mapping[str, float]]) -> None:
    for mode, ratio in found["model_rollout_ratio"].items():
        print(
            f"{mode:20} sampling takes {ratio:.2f} of plain, {found['model_wasted_tokens'][mode]:5.1%} in vain",
            flush=True,
        )


def run_mode(lengths: Lengths, settings: Mapping[str, Any], steps: int) -> tuple[float, float]:
    """(mean time of a step's sampling, share of the sampled tokens that nobody trains on)."""
    batch = {"rollout.num_prompts": PROMPTS, "algorithm.num_samples_per_prompt": SAMPLES, "train.batch_size": PROMPTS}
    quota = quota_of(build({**batch, **settings}))
    prompts = [Prompt(i, "", (i,), "") for i in range(20 * len(lengths.groups))]
    source = PromptSource(prompts, PROMPTS, seed=0)
    total = trained = sampled = 0.0
    for number in range(steps):
        took, kept, asked = _step(lengths, source, quota, number)
        total, trained, sampled = total + took, trained + kept, sampled + asked
    return total / steps, 1 - trained / sampled


def _step(lengths: Lengths, source: PromptSource, quota: Quota, number: int) -> tuple[float, float, float]:
    """(time, tokens that are trained on, tokens that were sampled)."""
    step = Step(str(number), source.peek(quota.draws), quota, _SAMPLING)
    chance = random.Random(number)
    responses = [chance.sample(lengths.groups[draw.prompt.id % len(lengths.groups)], SAMPLES) for draw in step.draws]
    queue = sorted(range(len(step.draws)), key=lambda index: (index not in step.awaited, index))
    tally = Tally(dist.HashStore(), "0", Counts(awaited=len(step.awaited)))
    part = SamplingTry(step, tally, queue, most_open=quota.at_once, poll_s=_POLL)
    selector = _JumpingSelector()

    async def sample(index: int) -> Group:
        await asyncio.sleep(max(responses[index]))
        return Group([], None, selector.now)

    with asyncio.Runner(loop_factory=lambda: _loop(selector)) as runner:
        runner.run(part.run(sample, lambda counts: None))
    took = selector.now
    report = Report({index: group.ended_s for index, group in part.done.items()}, {}, frozenset(part.started))
    settlement = settle([report], quota.groups, step.awaited)
    positions = [draw.position for draw in step.draws]
    source.settle(
        positions[: settlement.drawn],
        {positions[i] for i in settlement.deferred},
        {positions[i] for i in settlement.unasked},
    )
    kept = sum(sum(responses[index]) for index in settlement.kept)
    return took, kept, sum(min(tokens, took) for index in part.started for tokens in responses[index])


def _loop(selector: _JumpingSelector) -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    return loop
