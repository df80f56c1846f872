"""Settings of `[reward]` that cannot be meant are named before anything is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward_checks import spawns_reward_model
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]
SCORER = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward.kind": "function"}, "reward.function is not set; pass --reward.function=FILE.py:NAME"),
        ({"data.train.reward": "function"}, "reward.function is not set"),
        ({"reward.kind": "function", "reward.function": "f"}, "reward.function=f must be FILE.py:NAME or"),
        ({"reward.kind": "function", "reward.function": "a b:f"}, "reward.function=a b:f must be FILE.py:NAME or"),
        ({"reward.kind": "function", "reward.function": "/absent.py:f"}, "reward.function=/absent.py:f: there is no"),
        ({"reward.function": "a.b:f"}, "reward.function=a.b:f must go with reward.kind=function"),
        ({"reward.format": "^7$"}, "reward.format=^7$ must be one of: none, boxed, think, pattern"),
        ({"reward.format": "pattern"}, "reward.format_pattern is not set; reward.format=pattern needs a regular"),
        (
            {"reward.format": "pattern", "reward.format_pattern": "(["},
            "reward.format_pattern='([' must be a regular expression: ",
        ),
        (
            {"reward.format": "pattern", "reward.format_pattern": "\boxed"},
            r"reward.format_pattern='\x08oxed' holds the control character that \b stands for in double quotes; "
            r"write \\boxed there, or use '...'",
        ),
        ({"reward.format_pattern": "^7$"}, "reward.format_pattern=^7$ must go with reward.format=pattern"),
        ({"reward.format_reward": 0.5}, "reward.format_reward=0.5 must go with reward.format"),
        ({"reward.batch_time_limit_s": 1.0}, "reward.batch_time_limit_s=1.0 must be at least reward.time_limit_s=5.0"),
        ({"reward.workers": 0}, "reward.workers=0 must be at least 1"),
        ({"reward.memory_limit_mb": 0}, "reward.memory_limit_mb=0 must be at least 1"),
        ({"reward.batch_time_limit_s": 0.0}, "reward.batch_time_limit_s=0.0 must be above 0"),
        ({"reward.kind": "remote"}, "reward.url is not set; pass the URL of your service"),
        ({"data.train.reward": "remote"}, "reward.url is not set"),
        ({"reward.kind": "remote", "reward.url": "host:80"}, "reward.url=host:80 must be the URL of your service"),
        ({"reward.kind": "model"}, "reward.model_path is not set"),
        ({"reward.kind": "model", "reward.model_urls": ("http://a:1",)}, "reward.model_path is not set"),
        ({"reward.kind": "model", "reward.model_path": "/nowhere"}, "reward.model_path=/nowhere must be a Hugging"),
        ({"reward.kind": "model", "reward.model_urls": ("a:1",)}, "reward.model_urls=a:1 must be a URL"),
        (
            {"reward.kind": "model", "reward.model_urls": ("http://a:1", "http://a:1/")},
            "reward.model_urls names a server twice",
        ),
        ({"reward.request_deadline_s": 0.0}, "reward.request_deadline_s=0.0 must be above 0"),
        ({"reward.max_retries": -1}, "reward.max_retries=-1 must be at least 0"),
    ],
)
def test_a_reward_that_cannot_be_is_named(make: Make, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make(changes), "train")
    assert str(caught.value).startswith(expected)


def test_rewards_that_can_be_pass(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "my rewards.py"
    file.write_text("def f(rollouts): ...")
    validate(make({"reward.kind": "function", "reward.function": f"{file}:f"}), "train")
    validate(make({"reward.kind": "function", "reward.function": "package.module:f"}), "train")
    for form in ({"reward.format": "think"}, {"reward.format": "pattern", "reward.format_pattern": r"^Answer: \d+$"}):
        validate(make({**form, "reward.format_reward": -0.5}), "train")


def reward_model(tmp_path: Path, **config: Any) -> str:
    path = tmp_path / "reward"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**SCORER, **config}))
    return str(path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["Qwen2ForRewardModel"], "id2label": None},
        {"architectures": ["LlamaForSequenceClassificationWithNormal_Weights"], "id2label": {"0": "a", "1": "b"}},
    ],
)
def test_models_that_score_pass(make: Make, tmp_path: Path, config: dict[str, Any]) -> None:
    own = make({"reward.kind": "model", "reward.model_path": reward_model(tmp_path, **config)})
    validate(own, "train")
    assert spawns_reward_model(own)


def test_running_servers_are_not_started_again(make: Make, tmp_path: Path) -> None:
    path = reward_model(tmp_path)
    config = make({"reward.kind": "model", "reward.model_path": path, "reward.model_urls": ("http://a:1",)})
    validate(config, "train")
    assert not spawns_reward_model(config)
    assert not spawns_reward_model(make({"reward.model_path": path})), "no source asks for it"
    assert spawns_reward_model(make({"reward.model_path": path, "data.train.reward": "model"}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "must be a model that scores, .* says architectures=LlamaForCausalLM",
        ),
        ({"architectures": None}, "says architectures=nothing"),
        ({"id2label": {"0": "bad", "1": "good"}}, "must be a model with one label; it has 2"),
        ({"id2label": None}, "must be a model with one label; it has 2"),
    ],
)
def test_a_model_that_gives_no_reward_is_refused(
    make: Make, tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        validate(make({"reward.kind": "model", "reward.model_path": reward_model(tmp_path, **config)}), "train")
