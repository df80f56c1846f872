"""Reward functions of the user's, by path."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.build import build_reward
from megatron_rpp.reward.function import FunctionReward
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.reward.verdicts import verdict_only
from megatron_rpp.reward.workers import fork_server

FUNCTIONS = """
import ctypes, itertools, sys, time
import numpy

constant = 3

def array(rollouts):
    return numpy.ones(len(rollouts))

def deed(rollouts):
    if rollouts[0].text in DEEDS:
        return DEEDS[rollouts[0].text](rollouts)
    for r in rollouts:
        if r.text in DEEDS:
            DEEDS[r.text]([r])
    return [7.0 + len(r.text) for r in rollouts]

def loop(rollouts):
    while True:
        pass

def broken(rollouts):
    raise KeyError("user's own")

DEEDS = {
    "loop": loop,
    "sleep": lambda _: time.sleep(1000),
    "segfault": lambda _: ctypes.string_at(0),
    "eat memory": lambda _: [bytearray(1 << 20) for _ in itertools.count()],
    "exit": lambda _: sys.exit(0),
    "raise": broken,
    "short": lambda _: [1.0],
    "infinite": lambda rollouts: [float("inf") for _ in rollouts],
    "words": lambda rollouts: ["good" for _ in rollouts],
    "nothing": lambda _: None,
    "print": lambda rollouts: [print("0 {}") or 1.0 for _ in rollouts],
    "large": lambda rollouts: [-1.25e300 for _ in rollouts],
}
"""


def rollouts(*texts: str) -> list[Rollout]:
    prompt = Prompt(0, "", (1,), "7", {"level": 1})
    return [Rollout(prompt, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),)) for text in texts]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "my rewards.py"
    path.write_text(FUNCTIONS)
    return path


def reward(path: str) -> FunctionReward:
    limits = RewardConfig(wrong=-3.0, time_limit_s=0.5, batch_time_limit_s=3.0, memory_limit_mb=256, workers=2)
    return FunctionReward(dataclasses.replace(limits, kind="function", function=path))


@pytest.fixture(scope="module")
def deed(file: Path) -> Iterator[FunctionReward]:
    found = reward(f"{file}:deed")
    yield found
    found.close()


def test_a_function_of_a_module_on_pythonpath_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "rewards.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = reward("their_package.rewards:array")
    assert found(rollouts("a", "bcd")) == [1.0, 1.0] and found([]) == []
    found.close()


@pytest.mark.parametrize("text", ["loop", "sleep", "segfault", "eat memory", "exit"])
def test_a_response_that_hangs_or_breaks_the_function_costs_its_limits_and_no_other_reward(
    deed: FunctionReward, text: str
) -> None:
    deed.metrics()
    start = time.monotonic()
    assert deed(rollouts("a", text, "bc")) == [8.0, -3.0, 9.0]
    assert time.monotonic() - start < 20.0  # 3 s together, then twice 0.5 s of processor time, or 2 s by the clock
    late = float(text in ("loop", "sleep"))
    assert deed.metrics().sums == {"reward/timeouts": late, "reward/broken": 1.0 - late}
    assert deed(rollouts("a")) == [8.0], "the next call pays for this one"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "deed gave 1 rewards for 2 responses"),
        ("infinite", "deed gave inf; a reward must be a finite number"),
        ("words", "deed gave 'good'; a reward must be a finite number"),
        ("nothing", "deed must return a list, not None"),
        ("raise", "deed raised KeyError: .user's own.\n.*line .* in broken"),
    ],
)
def test_a_result_that_is_no_list_of_rewards_and_an_error_name_the_function(
    deed: FunctionReward, name: str, message: str
) -> None:
    with pytest.raises(RewardError, match=f"(?s){message}"):
        deed(rollouts(name, "b"))


def test_a_function_that_fails_on_every_response_ends_the_run_and_one_response_does_not(deed: FunctionReward) -> None:
    message = (
        r"deed gave none of 2 responses a reward, .*: raise reward.batch_time_limit_s=3 .*, reward.time_limit_s=0.5 "
        r".* or reward.memory_limit_mb=256, or mend"
    )
    with pytest.raises(RewardError, match=message):
        deed(rollouts("segfault", "segfault"))
    assert deed(rollouts("segfault")) == [-3.0]


def test_held_out_responses_are_scored_in_the_same_processes_by_their_own_rule() -> None:
    """Each parent has imported torch: one a replica is enough."""
    config = RewardConfig(kind="function", function="absent.py:f", wrong=-3.0)
    training = build_reward(config, {"": SourceConfig()})
    sources = {"set": SourceConfig(), "sum": SourceConfig(reward="math_answer")}
    held_out = build_reward(verdict_only(config), sources, beside=training)
    assert training.function is not None and held_out.function is not None
    assert training.function._pool._server is held_out.function._pool._server
    assert (training.function._config.wrong, held_out.function._config.wrong) == (-3.0, 0.0)
    assert not training.function._pool.is_running, "nothing runs on a rank that scores nothing"
    with pytest.raises(ConfigError, match=r"absent\.py cannot be imported"):
        held_out.start()


def test_a_file_that_takes_too_long_to_import_is_told_as_that_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(fork_server, "START_LIMIT_S", 1.0)
    starts, spawn = list[int](), fork_server._spawn

    def counted(control_fd: int) -> subprocess.Popen[bytes]:
        starts.append(control_fd)
        return spawn(control_fd)

    monkeypatch.setattr(fork_server, "_spawn", counted)
    with pytest.raises(ConfigError, match=r"slow.py:f: importing took over 1 s; load less at import"):
        reward(f"{path}:f").start()
    assert len(starts) == 1


def test_an_error_of_one_response_by_itself_is_not_the_reward_0(deed: FunctionReward) -> None:
    deed.metrics()
    assert deed(rollouts("segfault", "raise", "abc")) == [-3.0, -3.0, 10.0]
    assert deed.metrics().sums["reward/broken"] == 2.0


def test_what_the_function_prints_and_how_large_its_numbers_are_changes_no_reward(deed: FunctionReward) -> None:
    assert deed(rollouts("print", "b")) == [1.0, 1.0]
    assert deed(rollouts("large", "b")) == [-1.25e300] * 2
    assert deed._pool.score([("", r) for r in rollouts("large", "print", "a")]) == [-1.25e300, 1.0, 8.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{file}:no_such", "has no no_such"),
        ("{file}:constant", "constant is a int, not a function"),
        ("absent.py:f", "absent.py cannot be imported: FileNotFoundError"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("{broken}:f", "cannot be imported: SyntaxError"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_the_run(file: Path, path: str, message: str) -> None:
    broken = file.with_name("broken.py")
    broken.write_text("def f(:")
    with pytest.raises(ConfigError, match=message):
        reward(path.format(file=file, broken=broken)).start()
