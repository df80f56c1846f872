"""Two real SGLang servers, of which one is of another version, stopped or killed while both sample."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, RunConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.fleet import Server, ServerFleet
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient
from tests.support.processes import child_at

EOS = 1
HEALTH_DEADLINE_S = 10.0  # a busy machine must not make a healthy server look silent
PROMPTS = [Prompt(i, "", (2 + i % 10, 12, 2 + i // 10, 15), "") for i in range(32)]
SAMPLING = SamplingParams(4, 64, 1.0, 1.0, (EOS,), seed=3)


@dataclass(frozen=True)
class Rig:
    """A fleet of two servers, a client of it, and what undisturbed sampling gives."""

    fleet: ServerFleet
    client: SGLangClient
    expected: list[Rollout]


@pytest.fixture(scope="module")
def rig(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rollout = RolloutConfig(
        num_servers=2,
        context_length=128,
        health_deadline_s=HEALTH_DEADLINE_S,
        restart_backoff_s=600.0,  # test_loop sees a real server come back; a start takes long
        max_concurrent_requests=16,
        max_retries=0,  # a lost server must not cost a retry
    )
    run_dir = tmp_path_factory.mktemp("fleet")
    config = Config(run=RunConfig(dir=str(run_dir)), model=ModelConfig(path=str(tiny_model_dir)), rollout=rollout)
    fleet = ServerFleet(config)
    try:
        fleet.wait_ready()
        assert {log.name for log in (run_dir / "logs").iterdir()} == {"sglang-0.txt", "sglang-1.txt"}
        client = SGLangClient((), rollout, decode=lambda ids: "")
        bring_to(0, fleet, client)
        yield Rig(fleet, client, client.generate(PROMPTS, SAMPLING))
    finally:
        fleet.stop()


def bring_to(version: int, fleet: ServerFleet, client: SGLangClient) -> None:
    """What a weight sync does to healthy servers, without the weights."""
    urls = tuple(server.url for server in fleet.refresh())
    for url in urls:
        post_json(url, "update_weight_version", {"new_version": str(version)}, 30.0)
    fleet.mark(urls, version)
    client.urls, client.version = urls, version


def group_of(url: str) -> int:
    """Process group of the spawned server at `url`."""
    return os.getpgid(child_at(url).pid)


def once_some_are_done(act: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress callback that acts once, when a quarter of the responses is there."""
    acted = False

    def progress(done: int, asked: int) -> None:
        nonlocal acted
        if not acted and done >= asked / 4:
            acted = True
            act()

    return progress


def check_complete(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    """The very responses of undisturbed sampling, in order; two may differ, as other batches round differently."""
    assert [r.prompt.id for r in rollouts] == [p.id for p in PROMPTS for _ in range(4)]
    assert sum(a.response_ids != b.response_ids for a, b in zip(rollouts, expected, strict=True)) <= 2
    assert {span.version for r in rollouts for span in r.version_spans} == {0}
    assert all(r.version_spans[-1].end == len(r.response_ids) for r in rollouts)
    assert len({r.response_ids for r in expected}) > len(PROMPTS), "the check above cannot tell samples apart"


def test_what_a_server_samples_before_it_is_synced_is_not_accepted(rig: Rig) -> None:
    new, synced = rig.client.urls
    post_json(new, "update_weight_version", {"new_version": "default"}, 30.0)  # what SGLang says after a start
    check_complete(rig.client.generate(PROMPTS, SAMPLING), rig.expected)
    assert rig.client.suspects == {new}
    servers = [Server(new, ServerInfo(1, "cpu"), -1), Server(synced, ServerInfo(1, "cpu"), 0)]
    assert list(rig.fleet.refresh(rig.client.suspects)) == servers, "it is healthy, and stays"


def test_a_stopped_server_holds_sampling_up_for_its_deadline_only(rig: Rig) -> None:
    bring_to(0, rig.fleet, rig.client)
    other, victim = rig.client.urls
    group = group_of(victim)
    stopped_at = 0.0

    def stop() -> None:
        nonlocal stopped_at
        os.killpg(group, signal.SIGSTOP)
        stopped_at = time.monotonic()

    rollouts = rig.client.generate(PROMPTS, SAMPLING, progress=once_some_are_done(stop))
    held_s = time.monotonic() - stopped_at
    os.killpg(group, signal.SIGCONT)
    check_complete(rollouts, rig.expected)
    assert rig.client.suspects == {victim}
    assert HEALTH_DEADLINE_S / 2 < held_s < 4 * HEALTH_DEADLINE_S, f"{held_s:.1f} s; sampling alone takes a few"
    versions = {server.url: server.version for server in rig.fleet.refresh(rig.client.suspects)}
    assert versions == {other: 0, victim: -1}, "it goes on, but must be synced first"


def test_a_server_that_is_killed_costs_no_response_and_is_dropped(rig: Rig) -> None:
    bring_to(0, rig.fleet, rig.client)
    victim, other = rig.client.urls
    group = group_of(victim)
    kill = once_some_are_done(lambda: os.killpg(group, signal.SIGKILL))
    check_complete(rig.client.generate(PROMPTS, SAMPLING, progress=kill), rig.expected)
    assert rig.client.suspects == {victim}
    assert rig.fleet.refresh(rig.client.suspects) == (Server(other, ServerInfo(1, "cpu"), 0),)
    assert not psutil.pid_exists(group)
