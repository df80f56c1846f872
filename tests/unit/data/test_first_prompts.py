"""`--check` tells the length of what a run will ask, and asks no more of the tokenizer than a thousand prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import Config
from megatron_rpp.data import first_prompts
from megatron_rpp.data.first_prompts import Longest, longest_demonstration, longest_prompts
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_dirs import write_fast


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_fast(tmp_path / "model", template="user:{{ messages[0].content }}", bos=True)
    return load_tokenizer(tmp_path / "model")


def config_of(tmp_path: Path, **more: Any) -> Config:
    """Prompts of 1, 2, 3, ... characters in all files."""
    for name in ("train", "aime"):
        rows = [{"prompt": "1" * i, "answer": "2"} for i in range(1, 7)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build({
        "data.train.path": str(tmp_path / "train.jsonl"), "data.evals.aime.path": str(tmp_path / "aime.jsonl"),
        "sft.data": str(tmp_path / "train.jsonl"), "eval.num_prompts": 4,
        "rollout.context_length": 16, "rollout.max_response_tokens": 4, **more,
    })  # fmt: skip


def test_the_longest_prompt_of_each_source_is_counted_as_it_is_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, aime = longest_prompts(config_of(tmp_path), tokenizer)
    assert train == Longest("data.train", 6, 7, 12)  # with its BOS
    assert aime == Longest("data.evals.aime", 4, 5, 12)  # eval.num_prompts of it are asked
    assert str(train) == "data.train: of the first 6 prompts the longest is 7 tokens; limit 12"
    train, _ = longest_prompts(config_of(tmp_path, **{"data.chat_template": True}), tokenizer)
    assert train.tokens == len("user:111111")
    assert longest_demonstration(config_of(tmp_path), tokenizer) == Longest("sft.data", 6, 9, 16)  # answer and end


def test_no_more_than_the_first_prompts_are_tokenized(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_prompts, "FIRST", 3)
    assert [(found.count, found.tokens) for found in longest_prompts(config_of(tmp_path), tokenizer)] == [(3, 4)] * 2
    assert longest_demonstration(config_of(tmp_path), tokenizer).count == 3
    few = config_of(tmp_path, **{"data.train.size": 2, "data.evals.aime.size": 1})
    assert [found.count for found in longest_prompts(few, tokenizer)] == [2, 1]


def test_a_prompt_that_is_too_long_is_named_by_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    short = config_of(tmp_path, **{"rollout.context_length": 10})
    with pytest.raises(ValueError, match=r"train\.jsonl:6: the prompt is 7 tokens, the limit is 6; raise rollout"):
        longest_prompts(short, tokenizer)
    with pytest.raises(ValueError, match=r"train\.jsonl:6: prompt and response are 9 tokens, more than"):
        longest_demonstration(config_of(tmp_path, **{"rollout.context_length": 8}), tokenizer)
