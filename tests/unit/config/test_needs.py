"""A key that cannot act is an error, not passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import fields
from megatron_rpp.config.needs import NEEDS, SOURCE_NEEDS
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]
AS_FLAGS = {
    "fp8.params": "true",
    "eval.pass_at": "1",
    "memory.recompute_modules": "mlp,moe",
    "reward.model_urls": "http://a:1",
    "reward.model_server_args": "--x",
    "data.train.task_args": '{"a" = 1}',
}
"""Where Python writes a value in another way."""


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("fp8.params", True, "fp8.recipe, such as blockwise"),
        ("memory.recompute_modules", ("mlp", "moe"), "memory.recompute=selective"),
        ("eval.pass_at", (1,), "a set of data.evals whose rewards are verdicts, by kind math_answer or"),
        ("reward.function", "a.b:f", "reward.kind=function, or such a reward of a source"),
        ("reward.url", "http://a:1", "reward.kind=remote, or such a reward of a source"),
        ("reward.model_path", "m", "reward.kind=model, or such a reward of a source"),
        ("reward.model_urls", ("http://a:1",), "reward.kind=model"),
        ("reward.model_server_args", ("--x",), "reward.kind=model"),
        ("reward.format_pattern", "a", "reward.format=pattern"),
        ("reward.format_reward", 0.5, "reward.format, such as boxed"),
        ("reward.overlong_penalty", 0.5, "reward.overlong_buffer_tokens above 0"),
        ("schedule.max_draws", 2.0, "schedule.dynamic_sampling=true"),
        ("schedule.max_deferrals", 5, "schedule.over_sampling above 1"),
        ("data.train.task", "chain_sum", "data.train.kind=reasoning_gym"),
        ("data.train.task_args", {"a": 1}, "data.train.kind=reasoning_gym"),
        ("data.train.seed", 1, "data.train.kind=reasoning_gym"),
        ("data.train.split", "test", "data.train.kind=huggingface"),
        ("data.evals.x.split", "test", "data.evals.x.kind=huggingface"),
        ("data.evals.x.seed", 3, "data.evals.x.kind=reasoning_gym"),
    ],
)
def test_a_key_without_what_it_needs_is_named(make: Make, key: str, value: Any, needs: str) -> None:
    path = make().data.train.path
    more = {"data.evals.x.path": f"{path[:-10]}other.jsonl"} if "evals" in key else {}
    for each in more.values():
        open(each, "w").close()
    with pytest.raises(ConfigError) as caught:
        validate(make({**more, key: value}), "train")
    assert str(caught.value).startswith(f"{key}={AS_FLAGS.get(key, value)} must go with {needs}")
    assert str(caught.value).endswith("; else it does nothing")
    default = fields()[key.replace("evals.x", "evals.NAME")].default
    validate(make({**more, key: default}), "train")


def test_a_path_beside_a_task_is_named(make: Make) -> None:
    gym = {"data.train.kind": "reasoning_gym", "data.train.task": "chain_sum"}
    with pytest.raises(
        ConfigError, match=r"data\.train\.path=.* must go with data\.train\.kind=jsonl, parquet or hugg"
    ):
        validate(make(gym), "train")
    validate(make({**gym, "data.train.path": "", "data.train.seed": 3, "data.train.task_args": {"a": 1}}), "train")


def test_what_is_needed_may_come_from_any_source(make: Make, tmp_path: Any) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.touch()
    remote = {"data.evals.x.path": str(held_out), "data.evals.x.reward": "remote", "reward.url": "http://a:1"}
    validate(make(remote), "train")
    validate(make({"schedule.max_deferrals": 5, "schedule.token_budget": 100}), "train")
    validate(make({"schedule.max_draws": 2.0, "schedule.dynamic_sampling": True}), "train")


def test_chunks_are_for_log_probs_that_are_not_fused(make: Make) -> None:
    chunks = {"train.logprob_chunk_tokens": 8}
    with pytest.raises(ConfigError, match=r"chunk_tokens=8 must go with train\.fused_logprobs=off or auto; else"):
        validate(make({**chunks, "train.fused_logprobs": "on"}), "train")
    validate(make(chunks), "train")


def test_the_table_names_keys_that_are_there() -> None:
    assert set(NEEDS) <= set(fields()) and {f"data.train.{key}" for key in SOURCE_NEEDS} <= set(fields())
