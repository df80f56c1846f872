"""The fleet: attached servers are small fakes, spawned ones small programs in SGLang's place."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fake_sglang import SPAWNED, FakeServer, running

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, RunConfig
from megatron_rpp.rollout import backoff
from megatron_rpp.rollout.backoff import Backoff
from megatron_rpp.rollout.fleet import Server, ServerFleet
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.urls_file import parse_urls
from tests.support.processes import child_at


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    with running() as first, running() as second:
        first.tp_size = 2
        yield [first, second]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ServerFleet]]:
    """A fleet of a rollout section; while tmp_path/broken exists, its spawned servers die at once."""

    def command(model_path: str, rollout: RolloutConfig, dtype: str, device: str, port: int, **_: Any) -> list[str]:
        return [sys.executable, "-c", SPAWNED, str(port), str(tmp_path / "broken")]

    monkeypatch.setattr("megatron_rpp.rollout.sglang_server.server_command", command)
    with ExitStack() as stack:

        def make(**rollout: Any) -> ServerFleet:
            defaults = {"health_deadline_s": 2.0, "startup_deadline_s": 30.0, "restart_backoff_s": 0.05}
            run = RunConfig(dir=str(tmp_path / "run"))
            fleet = ServerFleet(Config(run=run, rollout=RolloutConfig(**defaults | rollout)))
            stack.callback(fleet.stop)
            return fleet

        yield make


def until(is_true: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def urls(servers: tuple[Server, ...]) -> list[str]:
    return [server.url for server in servers]


def test_attached_servers_say_their_size_and_keep_the_version_they_were_brought_to(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    first, second = fakes
    fleet = build(urls=(first.url + "/", second.url))
    fleet.wait_ready()
    fleet.mark([second.url], 4)
    assert fleet.refresh() == (Server(first.url, ServerInfo(2, "cpu"), -1), Server(second.url, ServerInfo(1, "cpu"), 4))


def test_a_silent_suspect_is_left_out_within_its_deadline_and_comes_back_without_a_version(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    first, second = fakes
    fleet = build(urls=(first.url, second.url))
    fleet.wait_ready()
    fleet.mark([first.url, second.url], 4)
    first.stopped.set()
    start = time.monotonic()
    assert urls(fleet.refresh({first.url})) == [second.url]
    assert time.monotonic() - start < 20
    first.stopped.clear()
    assert [(s.url, s.version) for s in fleet.refresh()] == [(first.url, -1), (second.url, 4)]


def test_a_healthy_suspect_stays_but_must_be_synced_again(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    fleet = build(urls=(fakes[0].url, fakes[1].url))
    fleet.wait_ready()
    fleet.mark([f.url for f in fakes], 4)
    assert [s.version for s in fleet.refresh({fakes[1].url})] == [4, -1]


def test_a_dead_server_is_noticed_without_being_a_suspect(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    fleet = build(urls=(fakes[0].url, fakes[1].url))
    fleet.wait_ready()
    fakes[0].shutdown()
    fakes[0].server_close()
    assert urls(fleet.refresh()) == [fakes[1].url]


def test_a_healthy_server_is_not_probed_again_at_every_refresh(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    fleet = build(urls=(fakes[0].url,))
    fleet.wait_ready()
    fleet.refresh()
    assert fakes[0].probes == ["/health", "/server_info"]


def test_a_server_that_a_dead_trainer_left_paused_is_woken(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    paused = fakes[0]
    paused.status = 503

    def answer(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/continue_generation"
        paused.status = 200
        return 200, ""

    paused.answer = answer
    build(urls=(paused.url,), startup_deadline_s=5.0).wait_ready()


def test_dropped_servers_are_away_until_they_answer(fakes: list[FakeServer], build: Callable[..., ServerFleet]) -> None:
    fleet = build(urls=(fakes[0].url, fakes[1].url))
    fleet.wait_ready()
    fakes[0].status = 503
    fleet.drop(fakes[0].url, "its checksums differ")
    assert urls(fleet.refresh()) == [fakes[1].url]
    fakes[0].status = 200
    until(lambda: [(s.url, s.version) for s in fleet.refresh()] == [(fakes[0].url, -1), (fakes[1].url, -1)])


def test_an_attached_server_that_was_dropped_is_tried_again_after_growing_waits(
    fakes: list[FakeServer], build: Callable[..., ServerFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, but holds another model: at every look it would fail a sync."""
    now = 100.0
    monkeypatch.setattr(backoff, "time", SimpleNamespace(monotonic=lambda: now))
    bad, good = fakes
    fleet = build(urls=(bad.url, good.url), restart_backoff_s=8.0)
    fleet.wait_ready()
    for wait_s in (8.0, 16.0):
        fleet.drop(bad.url, "its checksums differ")
        now += wait_s - 0.1
        bad.probes.clear()
        assert urls(fleet.refresh()) == [good.url] and not bad.probes
        now += 0.2
        assert urls(fleet.refresh()) == [bad.url, good.url]
    fleet.mark([bad.url], 1)
    fleet.refresh()  # it has served a step
    fleet.drop(bad.url, "its checksums differ")
    now += 8.1
    assert urls(fleet.refresh()) == [bad.url, good.url]


def test_an_attached_server_that_never_answers_is_named_with_the_reason(
    fakes: list[FakeServer], build: Callable[..., ServerFleet]
) -> None:
    fakes[0].server_close()
    fleet = build(urls=(fakes[0].url, fakes[1].url), startup_deadline_s=0.5)
    with pytest.raises(RolloutError, match=rf"1 of 2 .*startup_deadline_s=0\.5.*{fakes[0].url}.*refused"):
        fleet.wait_ready()
    fleet.wait_ready(at_least=1)
    assert urls(fleet.refresh()) == [fakes[1].url]


def test_servers_join_and_leave_by_the_urls_file(
    fakes: list[FakeServer], build: Callable[..., ServerFleet], tmp_path: Path
) -> None:
    path = tmp_path / "urls"
    path.write_text(f"# servers\n\n{fakes[0].url}/  # the first\n")
    fleet = build(urls_file=str(path))
    fleet.wait_ready()
    fleet.mark([fakes[0].url], 7)
    path.write_text(f"{fakes[1].url}\n{fakes[0].url}\n{fakes[0].url}\n")
    assert [(s.url, s.version) for s in fleet.refresh()] == [(fakes[1].url, -1), (fakes[0].url, 7)]
    path.write_text(f"{fakes[1].url}\n")
    assert urls(fleet.refresh()) == [fakes[1].url]


def test_a_wrong_line_in_the_middle_of_a_run_is_warned_of_once(
    fakes: list[FakeServer],
    build: Callable[..., ServerFleet],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "urls"
    path.write_text(fakes[0].url)
    fleet = build(urls_file=str(path))
    fleet.wait_ready()
    path.write_text(f"{fakes[0].url}\nhost:1\n")
    with caplog.at_level(logging.WARNING):
        assert urls(fleet.refresh()) == urls(fleet.refresh()) == [fakes[0].url]
        path.unlink()
        assert urls(fleet.refresh()) == urls(fleet.refresh()) == [fakes[0].url], "an unreadable file changes nothing"
    messages = [record.getMessage() for record in caplog.records if record.name.endswith(".urls_file")]
    assert len(messages) == 2 and "line 2: 'host:1' must be a URL" in messages[0] and "cannot be read" in messages[1]


def test_a_wrong_urls_file_is_an_error_at_the_start(build: Callable[..., ServerFleet], tmp_path: Path) -> None:
    path = tmp_path / "urls"
    path.write_text("http://a:1\nhttp://:30000\n")
    with pytest.raises(ConfigError, match="line 2: 'http://:30000' must be a URL"):
        build(urls_file=str(path))
    with pytest.raises(ConfigError, match="absent cannot be read"):
        build(urls_file=str(tmp_path / "absent"))


@pytest.mark.parametrize("line", ["http://h:99999", "ftp://h:1", "http://h:0", "http://a b:1", "http://h:x"])
def test_what_is_no_url_is_not_taken_for_a_server(line: str) -> None:
    found, complaints = parse_urls(f"https://ok:1/\n{line}")
    assert found == ("https://ok:1",) and len(complaints) == 1


def test_a_spawned_server_that_dies_starts_again_after_its_backoff(build: Callable[..., ServerFleet]) -> None:
    fleet = build(restart_backoff_s=0.6)
    fleet.wait_ready()
    (server,) = fleet.refresh()
    fleet.mark([server.url], 3)
    killed_at = time.monotonic()  # before it is dropped, so that this machine's delays cannot shorten the wait
    child_at(server.url).kill()
    until(lambda: fleet.refresh() == ())
    until(lambda: len(fleet.refresh()) == 1)
    assert time.monotonic() - killed_at >= 0.6
    assert fleet.refresh()[0].version == -1, "the new process has no weights of this run"


def test_a_stopped_spawned_server_is_killed(build: Callable[..., ServerFleet]) -> None:
    fleet = build(num_servers=2, restart_backoff_s=30.0)
    fleet.wait_ready()
    first, second = fleet.refresh()
    process = child_at(first.url)
    os.killpg(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert urls(fleet.refresh({first.url})) == [second.url]
    assert time.monotonic() - start < 20 and not process.is_running()


def test_a_restart_that_fails_does_not_end_the_run(
    build: Callable[..., ServerFleet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = build(num_servers=2)
    fleet.wait_ready()
    first, second = fleet.refresh()
    (tmp_path / "broken").touch()
    with caplog.at_level(logging.WARNING):
        fleet.drop(first.url, "its checksums differ")
        until(lambda: urls(fleet.refresh()) == [second.url] and "weights are corrupt" in caplog.text)
    assert "its checksums differ" in caplog.text
    (tmp_path / "broken").unlink()
    fleet.wait_ready()
    assert len(fleet.refresh()) == 2


def test_at_the_start_a_death_is_an_error_with_the_end_of_the_log(
    build: Callable[..., ServerFleet], tmp_path: Path
) -> None:
    (tmp_path / "broken").touch()
    fleet = build(num_servers=2)
    with pytest.raises(RolloutError, match=r"(?s)died while starting.*sglang-[01]\.txt.*weights are corrupt"):
        fleet.wait_ready()


def test_a_port_in_use_is_an_error_that_leaves_no_server_behind(build: Callable[..., ServerFleet]) -> None:
    with running() as taken:
        before = {p.pid for p in psutil.Process().children()}
        with pytest.raises(ConfigError, match=f"rollout.port={taken.server_port} is in use"):
            build(num_servers=2, port=taken.server_port - 1)
        assert {p.pid for p in psutil.Process().children()} <= before


def test_waits_double_up_to_a_minute_and_begin_anew_after_a_good_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(backoff.time, "monotonic", lambda: now)
    waits = Backoff(8.0)
    assert waits.is_due
    assert [waits.failed() for _ in range(5)] == [8.0, 16.0, 32.0, 60.0, 60.0]
    assert not waits.is_due
    now = 161.0
    assert waits.is_due
    waits.reset()
    assert waits.failed() == 8.0


def test_what_costs_the_run_time_waits_twenty_times_as_long_in_the_end() -> None:
    waits = Backoff(8.0)
    assert [waits.failed(lost_s=10.0) for _ in range(6)] == [8.0, 16.0, 32.0, 64.0, 128.0, 200.0]
    assert [waits.failed(lost_s=10.0), waits.failed(), waits.failed()] == [200.0, 200.0, 60.0]


def test_only_a_server_that_survives_a_step_gets_its_first_backoff_back(
    build: Callable[..., ServerFleet], caplog: pytest.LogCaptureFixture
) -> None:
    def kill_and_drop() -> None:
        (server,) = fleet.refresh()
        child_at(server.url).kill()
        until(lambda: fleet.refresh() == ())
        fleet.wait_ready()

    fleet = build(restart_backoff_s=0.1)
    fleet.wait_ready()
    with caplog.at_level(logging.WARNING):
        kill_and_drop()
        kill_and_drop()  # it was never synced in between
        fleet.mark(urls(fleet.refresh()), 1)
        fleet.refresh()
        kill_and_drop()
    waits = [
        r.getMessage().split("again in ")[1].split(" s")[0] for r in caplog.records if "again in" in r.getMessage()
    ]
    assert waits == ["0.1", "0.2", "0.1"]
