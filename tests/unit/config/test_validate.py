from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.preflight import check_host, check_port
from megatron_rpp.config.ranges import CHOICES, RANGES, unchecked_numbers
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import Command, validate

Make = Callable[..., Config]


def message(config: Config, command: Command = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config, command)
    return str(caught.value)


def test_valid_configurations_pass(make: Make) -> None:
    validate(make(), "train")
    validate(make(), "sft")
    validate(make({"rollout.urls": ("http://a:1/", "https://a:1", "http://a", "http://[::1]:2")}), "train")
    validate(make({"parity.correct": 0.1}), "train")
    validate(make({"parity.correct": 0.6, "parity.stop": 0.0}), "train")
    validate(make({"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}), "train")
    validate(make({"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.data": 2}), "train")
    validate(make({"parallel.context": 2, "train.micro_batch_tokens": 2048}), "train")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel.data": 3}, "parallel.data=3 must divide rollout.num_prompts=256"),
        ({"parallel.data": 256}, "parallel.data=256 must divide train.batch_size=128"),
        (
            {"train.batch_size": 96},
            "train.batch_size=96 must divide rollout.num_prompts=256 x algorithm.num_samples_per_prompt=4 = 1024",
        ),
        (
            {"parallel.context": 2},
            "parallel.context=2 must go with train.micro_batch_tokens, such as 2048: packed sequences",
        ),
        (
            {"train.micro_batch_tokens": 2047},
            "train.micro_batch_tokens=2047 must be at least rollout.context_length=2048",
        ),
        ({"parallel.context": 0, "train.micro_batch_tokens": 2048}, "parallel.context=0 must be at least 1"),
        ({"rollout.max_response_tokens": 2048}, "rollout.max_response_tokens=2048 must be below "),
        ({"weight_sync.transports": ()}, "weight_sync.transports is empty; name at least one"),
        ({"weight_sync.transports": ("disk", "disk")}, "weight_sync.transports=disk,disk names one twice"),
        (
            {"weight_sync.transports": ("delta",), "rollout.release_memory": True},
            "weight_sync.transports=delta changes the weights that servers hold, and rollout.release_memory=true",
        ),
        (
            {"rollout.port": 65535, "rollout.num_servers": 2},
            "rollout.port=65535 leaves no ports for rollout.num_servers=2",
        ),
        ({"rollout.urls": ("host:1",)}, "rollout.urls=host:1 must be a URL such as http://host:30000"),
        ({"rollout.urls": ("http://a:1", "http://")}, "rollout.urls=http:// must be a URL"),
        ({"rollout.urls": ("http://a:99999",)}, "rollout.urls=http://a:99999 must be a URL"),
        ({"rollout.urls": ("http://a:1", "http://b:1", "http://a:1/")}, "rollout.urls names http://a:1/ twice"),
        ({"parity.correct": 0.5}, "parity.correct=0.5 must be below parity.stop=0.5"),
        ({"schedule.over_sampling": 0.9}, "schedule.over_sampling=0.9 must be at least 1"),
        ({"schedule.max_draws": 0.0}, "schedule.max_draws=0.0 must be at least 1"),
        (
            {"schedule.dynamic_sampling": True, "algorithm.num_samples_per_prompt": 1},
            "schedule.dynamic_sampling=true compares the responses to a prompt, and algorithm.num_samples_per_prompt=1",
        ),
        (
            {"schedule.dynamic_sampling": True, "schedule.max_draws": 1.5, "schedule.over_sampling": 2.0},
            "schedule.max_draws=1.5 must be at least schedule.over_sampling=2.0",
        ),
        ({"schedule.max_deferrals": -1}, "schedule.max_deferrals=-1 must be at least 0"),
        ({"schedule.time_budget_s": 600.0}, "schedule.time_budget_s=600 must be below rollout.request_deadline_s=600"),
        ({"rollout.port": 65536}, "rollout.port=65536 must be a port from 1 to 65535, or 0 for a free one"),
        ({"data.train.path": ""}, "data.train.path is not set; pass --data.train.path=FILE.jsonl"),
        ({"data.train.path": "/absent.jsonl"}, "data.train.path=/absent.jsonl must be an existing file"),
        ({"data.evals.x.kind": "reasoning_gym"}, "data.evals.x.task is not set"),
        ({"data.train.kind": "reasoning_gym"}, "data.train.task is not set"),
        (
            {"reward.kind": "reasoning_gym"},
            "reward.kind=reasoning_gym must go with data.train.kind=reasoning_gym, not jsonl",
        ),
        ({"data.prompt_template": "{prompt"}, "data.prompt_template='{prompt' must be a valid template"),
        ({"data.prompt_template": "say"}, "data.prompt_template='say' must name a key in braces"),
        ({"data.prompt_template": "{}"}, "data.prompt_template='{}' must name a key in braces"),
        ({"optimizer.min_lr": 1.0}, "optimizer.min_lr=1.0 must be at most optimizer.lr=5e-07"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr=nan must be a finite number"),
        ({"algorithm.gamma": 1.5}, "algorithm.gamma=1.5 must be between 0 and 1"),
    ],
)
def test_a_value_that_cannot_run_is_named(make: Make, changes: dict[str, Any], expected: str) -> None:
    assert message(make(changes)).startswith(expected)


@pytest.mark.parametrize("key", CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(make: Make, key: str) -> None:
    wanted = ", ".join(CHOICES[key])
    assert message(make({key: "other"})) == f"{key}=other must be one of: {wanted}"


@pytest.mark.parametrize("key", [key for keys in RANGES.values() for key in keys if key != "run.dir"])
def test_a_negative_number_is_refused(make: Make, key: str) -> None:
    assert message(make({key: -1})).startswith(f"{key}=-1 must be ")


def test_every_number_has_a_range_but_the_rewards() -> None:
    assert unchecked_numbers() == ["reward.correct", "reward.wrong", "reward.format_reward"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sft.data": ""}, "sft.data is not set"),
        ({"sft.output": ""}, "sft.output is not set"),
        ({"parallel.data": 3}, "parallel.data=3 must divide sft.batch_size=128"),
        ({"memory.offload": ("optimizer", "gradients")}, "memory.offload=optimizer,gradients is for `rpp train`"),
        ({"profile.steps": (1000,)}, "profile.steps=1000 is for `rpp train`"),
        ({"sft.min_lr": 1.0}, "sft.min_lr=1.0 must be at most sft.lr=0.001"),
    ],
)
def test_sft_needs_its_own_section(make: Make, changes: dict[str, Any], expected: str) -> None:
    assert message(make(changes), "sft").startswith(expected)


def test_sft_must_not_overwrite_the_model_it_starts_from(make: Make, model_dir: Path) -> None:
    assert "must differ from sft.init" in message(make({"sft.output": f"{model_dir}/."}), "sft")


def test_sft_does_not_need_what_only_rollouts_use(make: Make) -> None:
    validate(make({"model.path": "", "data.train.path": "", "rollout.num_prompts": 7}), "sft")
    validate(make({"profile.ranks": (7,), "run.steps": 1}), "sft")


def test_a_port_in_use_is_refused_and_a_free_or_attached_one_is_not(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expected = f"rollout.port={port} is in use on 127.0.0.1; choose another, or 0 for a free one"
        with pytest.raises(ConfigError) as caught:
            check_port(make({"rollout.port": port}))
        assert str(caught.value) == expected
        check_port(make({"rollout.port": port, "rollout.urls": ("http://other:1",)}))
    check_port(make({"rollout.port": port}))


def test_a_finished_run_is_not_overwritten_without_resume(make: Make, tmp_path: Path) -> None:
    config = make({"run.dir": str(tmp_path)})
    check_host(config, resume=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match="already holds a run; pass --resume to continue it"):
        check_host(config, resume=False)
    check_host(config, resume=True)
