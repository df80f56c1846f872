"""What was sampled is found again bit by bit, and nothing else is taken for it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.rollout.journal import Journal, fingerprint, forget, journal_folder
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.sglang_client import SampleGroup

SAMPLING = SamplingParams(2, 8, 1.0, 1.0, (9,), seed=4)
PROMPTS = [Prompt(i, f"p{i}", (5, 6, i), "0") for i in range(4)]


def config_of(run_dir: Path, **rollout: Any) -> Config:
    return Config(run=RunConfig(dir=str(run_dir)), rollout=RolloutConfig(**rollout))


def rollout(prompt: Prompt, group_id: int, mark: float = 0.0, **changes: Any) -> Rollout:
    logprobs = (-0.1 - 1e-17 + mark, -math.pi * 1e-8, -5e-324)
    given = Rollout(
        prompt, group_id, (7, 8, 9), logprobs, "a\u2028b", "stop", (VersionSpan(3, 0, 3),), prompt.token_ids
    )
    return replace(given, **changes)


class Engine:
    """A stand-in for the client: every sample that it draws is another one."""

    context_length = 64
    version = 3

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[int] = []
        self._dies_after = dies_after

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Any, *, group_ids: Any, on_prompt: Any
    ) -> None:
        for place in reversed(range(len(prompts))):  # they complete in any order
            if self._dies_after == len(self.asked):
                raise RuntimeError("killed")
            self.asked.append(group_ids[place])
            drawn = [rollout(prompts[place], group_ids[place], mark=-len(self.asked) - i / 7) for i in range(2)]
            on_prompt(place, drawn)
            if progress:
                progress(2 * len(self.asked), 2 * len(prompts))

    @asynccontextmanager
    async def open(self, sampling: SamplingParams) -> AsyncIterator[SampleGroup]:
        async def one(prompt: Prompt, group_id: int, payload: dict[str, Any]) -> list[Rollout]:
            found: list[Rollout] = []
            self.generate(
                [prompt], sampling, None, group_ids=[group_id], on_prompt=lambda _, drawn: found.extend(drawn)
            )
            return found

        yield one


def sample(engine: Engine, config: Config, *, sampling: SamplingParams = SAMPLING, **how: Any) -> list[Rollout]:
    """By a job that has just started."""
    journal = how.pop("journal", None) or Journal(config, how.pop("replica", 0))
    engine.version, progress = how.pop("version", 3), how.pop("progress", None)
    ids, prompts = how.pop("group_ids", range(4)), how.pop("prompts", PROMPTS)
    client: Any = engine
    return RecordedClient(client, journal).generate(prompts, sampling, progress, group_ids=ids)


def sample_one_by_one(engine: Engine, config: Config, wanted: Sequence[int]) -> list[Rollout]:
    """As a scheduled step does: prompts singly, each in a request of its own."""
    client: Any = engine
    engine.version = 3
    payloads = generate_payloads(PROMPTS, range(4), SAMPLING, engine.context_length)

    async def run() -> list[Rollout]:
        async with RecordedClient(client, Journal(config, 0)).open(SAMPLING) as ask:
            return [each for i in wanted for each in await ask(PROMPTS[i], i, payloads[i])]

    return asyncio.run(run())


def test_what_a_scheduled_step_has_sampled_is_not_sampled_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    before = sample_one_by_one(Engine(), config, [2, 0])
    again = Engine()
    assert sample_one_by_one(again, config, [0, 1, 2])[:2] == before[2:] and again.asked == [1]
    plain = Engine()
    assert sample(plain, config)[4:6] == before[:2] and plain.asked == [3], "one prompt at one place is one request"


def test_a_response_comes_back_bit_by_bit(tmp_path: Path) -> None:
    spans = (VersionSpan(-1, 0, 1), VersionSpan(2, 1, 2), VersionSpan(3, 2, 3))
    given = [
        rollout(PROMPTS[0], 0),
        rollout(PROMPTS[0], 0, version_spans=spans, engine_prompt_ids=(5, 6), finish_reason="length"),
        rollout(PROMPTS[0], 0, engine_prompt_ids=None, response_ids=(), rollout_logprobs=(), text=""),
    ]
    Journal(config_of(tmp_path), 0).add(3, "key", given)
    assert Journal(config_of(tmp_path), 0).find(3, "key", PROMPTS[0], 0) == given


def test_prompts_sampled_before_a_kill_are_not_sampled_again(tmp_path: Path) -> None:
    config, seen = config_of(tmp_path), []
    with pytest.raises(RuntimeError):
        sample(Engine(dies_after=2), config)
    second = Engine()
    found = sample(second, config, progress=lambda done, asked: seen.append((done, asked)))
    assert second.asked == [1, 0] and seen == [(4, 8), (6, 8), (8, 8)]
    assert [r.group_id for r in found] == [0, 0, 1, 1, 2, 2, 3, 3], "the order is that of the prompts"
    third = Engine()
    assert sample(third, config) == found and not third.asked
    assert sample(third, config_of(tmp_path / "new", replay=str(tmp_path))) == found and not third.asked
    assert sample(third, config_of(tmp_path / "new")) == found, "what was replayed is recorded"


def test_a_call_that_is_repeated_uses_what_it_has_sampled_before(tmp_path: Path) -> None:
    """Another replica failed, so that all are asked again; the journal must say what was trained on."""
    journal, engine = Journal(config_of(tmp_path), 0), Engine()
    first = sample(engine, config_of(tmp_path), journal=journal)
    assert sample(engine, config_of(tmp_path), journal=journal) == first and len(engine.asked) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"version": 4},
        {"sampling": replace(SAMPLING, seed=5)},
        {"sampling": replace(SAMPLING, temperature=0.0)},
        {"sampling": replace(SAMPLING, num_samples_per_prompt=3)},
        {"sampling": replace(SAMPLING, stop_token_ids=(9, 10))},
        {"group_ids": range(4, 8)},
        {"prompts": [replace(prompt, token_ids=(5, *prompt.token_ids)) for prompt in PROMPTS]},
    ],
)
def test_what_was_asked_otherwise_is_sampled_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    sample(Engine(), config_of(tmp_path))
    engine = Engine()
    sample(engine, config_of(tmp_path), **change)
    assert len(engine.asked) == 4


def test_only_what_determines_weights_or_samples_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path)
    same = replace(
        config,
        run=replace(config.run, steps=7, dir="elsewhere"),
        parallel=ParallelConfig(tensor=2, data=2),
        train=TrainConfig(micro_batch_size=2, logprob_chunk_tokens=3),
        rollout=replace(config.rollout, urls=("http://a:1",), request_deadline_s=1.0, record="all"),
    )
    assert fingerprint(same) == fingerprint(config)
    other = replace(config, optimizer=OptimizerConfig(lr=1.0))
    others = [other, replace(config, run=replace(config.run, seed=1)), config_of(tmp_path, temperature=0.5)]
    assert len({fingerprint(config), *map(fingerprint, others)}) == 4
    sample(Engine(), config)
    engine = Engine()
    with caplog.at_level(logging.INFO):
        sample(engine, other)
    assert len(engine.asked) == 4 and "of 4 prompts in the journal are of other settings" in caplog.text


def test_a_torn_line_is_dropped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sample(Engine(), config)
    (path,) = journal_folder(tmp_path).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])
    engine = Engine()
    sample(engine, config)
    assert engine.asked == [0], "the last line was prompt 0's"
    assert [json.loads(line)["group"] for line in path.read_text(encoding="utf-8").splitlines()] == [3, 2, 1, 0]


def test_at_another_data_parallel_size_the_prompts_of_every_replica_are_found(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for replica in (0, 1):
        mine = range(4)[replica::2]
        sample(Engine(), config, replica=replica, prompts=[PROMPTS[i] for i in mine], group_ids=mine)
    engine = Engine()
    sample(engine, config)
    assert not engine.asked


def test_only_older_versions_are_forgotten(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        sample(Engine(), config_of(tmp_path), version=version)
    forget(tmp_path, before=3)
    assert [path.name for path in journal_folder(tmp_path).iterdir()] == ["version-000003.replica-0.jsonl"]
    forget(tmp_path)
    assert not [*journal_folder(tmp_path).iterdir()]


def test_off_writes_nothing(tmp_path: Path) -> None:
    sample(Engine(), config_of(tmp_path, record="off"))
    assert not journal_folder(tmp_path).exists()


def test_replay_of_a_run_without_a_journal_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.replay=.* must be the directory of a run with a journal"):
        Journal(config_of(tmp_path, replay=str(tmp_path / "none")), 0)


def test_full_disk_ends_the_recording_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal_folder(tmp_path).write_text("a file where the folder should be")
    assert len(sample(Engine(), config_of(tmp_path))) == 8
    assert "are recorded no more" in caplog.text
