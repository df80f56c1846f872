"""Reward functions of the user's, by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.function import FunctionReward
from megatron_rpp.reward.protocol import RewardError

FUNCTIONS = """
import torch

constant = 3

def length(rollouts):
    return [len(r.text) for r in rollouts]

def tensor(rollouts):
    return torch.ones(len(rollouts))

def short(rollouts):
    return [1.0]

def infinite(rollouts):
    return [float("inf") for _ in rollouts]

def words(rollouts):
    return ["good" for _ in rollouts]

def nothing(rollouts):
    pass

def broken(rollouts):
    raise KeyError("user's own")
"""
ROLLOUTS = [
    Rollout(Prompt(0, "", (1,), "7"), 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),)) for text in ("a", "bcd")
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(FUNCTIONS)
    return path


def reward(path: str) -> FunctionReward:
    return FunctionReward(RewardConfig(kind="function", function=path))


def test_a_function_of_a_file_or_of_a_module_is_called(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reward(f"{file}:length")(ROLLOUTS) == [1.0, 3.0]
    assert reward(f"{file}:tensor")(ROLLOUTS) == [1.0, 1.0]
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reward("their_package.rewards:length")(ROLLOUTS) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "short gave 1 rewards for 2 responses"),
        ("infinite", "infinite gave inf; a reward must be a finite number"),
        ("words", "words gave 'good'; a reward must be a finite number"),
        ("nothing", "nothing must return a list, not None"),
    ],
)
def test_a_result_that_is_no_list_of_rewards_names_the_function(file: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward(f"{file}:{name}")(ROLLOUTS)


def test_an_error_of_the_function_passes_through(file: Path) -> None:
    with pytest.raises(KeyError, match="user's own"):
        reward(f"{file}:broken")(ROLLOUTS)


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
        reward(path.format(file=file, broken=broken))
