"""A step that dynamic sampling leaves no group draws other prompts; where that does not help, the run says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from fake_sglang import STOP, FakeServer, running
from scheduled_steps import FakeReward, prompts

from megatron_rpp import collect as module
from megatron_rpp.collect import collect
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.sglang_client import SGLangClient

SOLVED, MIXED = (1.0, 1.0), (0.0, 1.0)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


@pytest.fixture
def session(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of one rank; draws of eight prompts, of which it wants four. `saved` has the arguments of `save`."""
    monkeypatch.setattr(module, "gather_objects", lambda value, group=None: [value])
    config = build({"rollout.num_prompts": 4, "schedule.dynamic_sampling": True, "schedule.max_draws": 2.0})
    client = RecordedClient(SGLangClient([server.url], config.rollout, lambda ids: ""), None)
    saved = list[Any]()
    s = SimpleNamespace(
        config=config,
        parallel=SimpleNamespace(store=dist.HashStore(), dp_group=None, dp_size=1, rank=0, is_replica_leader=True),
        prompt_source=PromptSource(prompts(60), 4, seed=0),
        rollout_engine=SimpleNamespace(with_retries=lambda sample: sample(client)),
        reporter=SimpleNamespace(progress=None),
        sampling=lambda step: SamplingParams(2, 8, 1.0, 1.0, (STOP,), seed=step),
        saved=saved,
    )
    s.save = lambda step, **how: saved.append((step, how, s.prompt_source.state_dict()))
    return s


def reward_where(is_mixed: Callable[[int], bool]) -> FakeReward:
    return FakeReward(lambda prompt: MIXED if is_mixed(prompt) else SOLVED)


def test_a_step_whose_first_draw_is_all_solved_trains_on_the_next(session: Any, server: FakeServer) -> None:
    first = {draw.prompt.id for draw in session.prompt_source.peek(8)}
    session.reward = reward_where(lambda prompt: prompt not in first)
    found = collect(session, 3)
    assert {each.prompt_id for each in found.skipped} == first and len(found.rollouts) == 8 == len(found.rewards or ())
    assert found.metrics["rollout/skipped_solved"] == 8 and found.metrics["rollout/groups"] == 4
    assert {r.group_id for r in found.rollouts} == {8, 9, 10, 11}, "they go on where the first draw's ended"
    seeds = [each["sampling_seed"] for payload in server.payloads for each in payload["sampling_params"]]
    assert len(set(seeds)) == len(seeds) == 2 * 12
    assert not session.saved
    assert {draw.prompt.id for draw in session.prompt_source.peek(48)}.isdisjoint(first), "each is used once an epoch"


def test_after_three_draws_in_vain_the_error_says_what_to_change_and_a_resumed_run_meets_other_prompts(
    session: Any,
) -> None:
    used = {draw.prompt.id for draw in session.prompt_source.peek(24)}
    session.reward = reward_where(lambda prompt: False)
    with pytest.raises(ConfigError, match=r"3 draws.*8, 8, 8 prompts.*schedule\.max_draws.*filter data\.train"):
        collect(session, 5)
    [(step, how, state)] = session.saved
    assert (step, how) == (5, {"wait": True, "replace": True})
    resumed = PromptSource(prompts(60), 4, seed=0)
    resumed.load_state_dict(state)
    assert {draw.prompt.id for draw in resumed.peek(36)}.isdisjoint(used)


def test_the_draws_of_a_step_have_one_budget_of_time_and_tokens(
    session: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each response has two tokens; the first draw's 8 groups of 2 use the whole budget up."""
    steps: list[Step] = []
    sample = module._sample
    monkeypatch.setattr(module, "_sample", lambda s, wanted: (steps.append(wanted), sample(s, wanted))[1])
    changes = {"schedule.token_budget": 32, "schedule.time_budget_s": 60.0, "train.batch_size": 4}
    session.config = build({"rollout.num_prompts": 4, "schedule.dynamic_sampling": True, "schedule.max_draws": 2.0,
                            "rollout.max_concurrent_requests": 1, **changes})  # fmt: skip
    first = {draw.prompt.id for draw in session.prompt_source.peek(8)}
    session.reward = reward_where(lambda prompt: prompt not in first)
    found = collect(session, 3)
    assert len(steps) == 2 and steps[0].began == steps[1].began and steps[1].tokens_before == 32
    assert found.metrics["rollout/groups"] < 4, "the second draw ends with its first train batch"


def test_the_counters_of_every_draw_leave_the_store(session: Any) -> None:
    session.reward = reward_where(lambda prompt: False)
    with pytest.raises(ConfigError):
        collect(session, 0)
    assert session.parallel.store.num_keys() == 0
