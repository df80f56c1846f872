"""What a reward model is asked, and what its server's reply is taken for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.reward.services.conversation import ConversationTokenizer
from megatron_rpp.reward.services.reward_model import RewardModel
from tests.unit.rollout.fake_sglang import FakeServer, Reply, running

TOKENS = ["<pad>", "<eos>", "<user>", "<bot>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}{% endfor %}<eos>"
)


def save_tokenizer(path: Path, template: str | None, vocab_size: int = len(TOKENS)) -> str:
    """One token a letter."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"],
    )
    fast.chat_template = template
    fast.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return str(path)


def ids(text: str) -> list[int]:
    return [TOKENS.index(letter) for letter in text]


def rollout(prompt: str, text: str, turns: tuple[dict[str, Any], ...] = ()) -> Rollout:
    asked = Prompt(3, prompt, (1,), "", turns=turns)
    return Rollout(asked, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


def sum_of_ids(path: str, payload: dict[str, Any]) -> Reply:
    return 200, [{"embedding": [float(sum(each))], "meta_info": {}} for each in payload["input_ids"]]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        fake.answer = sum_of_ids
        yield fake


def test_the_conversation_is_in_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = ConversationTokenizer(save_tokenizer(tmp_path, TEMPLATE))
    assert tokenizer.encode([("ab", "c"), ("d", "")]) == [[2, *ids("ab"), 3, *ids("c"), 1], [2, *ids("d"), 3, 1]]
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    assert tokenizer.encode([(turns, "d")]) == [[2, *ids("a"), 3, *ids("b"), 2, *ids("c"), 3, *ids("d"), 1]]


def test_without_a_template_both_texts_end_with_one_end_token(tmp_path: Path) -> None:
    tokenizer = ConversationTokenizer(save_tokenizer(tmp_path, None))
    assert tokenizer.encode([("ab", "c"), ("ab", "c<eos>")]) == [[*ids("abc"), 1]] * 2


def test_what_is_cut_is_the_end_of_the_response_and_not_the_templates(tmp_path: Path) -> None:
    tokenizer = ConversationTokenizer(save_tokenizer(tmp_path, TEMPLATE))
    assert tokenizer.shortened("ab", "cdefgh", 8) == [2, *ids("ab"), 3, *ids("cde"), 1]
    assert tokenizer.shortened("ab", "cdefgh", 5) == [2, *ids("ab"), 3, 1]
    with pytest.raises(RewardError, match="a prompt alone is 5 tokens of the reward model, whose servers take 4"):
        tokenizer.shortened("ab", "cdefgh", 4)


def test_a_token_that_would_end_the_server_is_not_sent(tmp_path: Path) -> None:
    tokenizer = ConversationTokenizer(save_tokenizer(tmp_path, TEMPLATE, vocab_size=len(TOKENS) - 1))
    assert tokenizer.encode([("a", "g")])
    with pytest.raises(RewardError, match="gives the token 11, and the model's vocab_size is 11"):
        tokenizer.encode([("a", "h")])


def test_a_directory_without_a_tokenizer_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"reward.model_path={tmp_path}: its tokenizer cannot be loaded"):
        ConversationTokenizer(str(tmp_path))


def test_scores_come_back_in_order_from_all_servers(server: FakeServer, tmp_path: Path) -> None:
    config = RewardConfig(kind="model", model_path=save_tokenizer(tmp_path, None), request_deadline_s=20.0)
    rollouts = [rollout("a" * (1 + i % 5), "b" * i) for i in range(40)]
    with running() as other:
        other.answer = sum_of_ids
        scores = RewardModel(config, [server.url + "/", other.url])(rollouts)
        assert len(server.payloads) + len(other.payloads) == 5 and server.payloads and other.payloads
    assert scores == [float(sum(ids(r.prompt.text + r.text)) + 1) for r in rollouts]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, [{"embedding": [1.0, 2.0]}]), "each entry must have one number in `embedding`"),
        ((200, [{"embedding": [float("nan")]}]), "a reward must be a finite number, not nan"),
        ((200, [{"text": "hello"}]), "each entry must have one number"),
        ((200, [{"embedding": [1.0]}] * 2), "2 rewards came back for 1 responses"),
        ((400, {"error": {"message": "The input is longer"}}), "HTTP 400: The input is longer"),
    ],
)
def test_what_is_not_one_finite_score_each_is_an_error(
    server: FakeServer, tmp_path: Path, reply: Reply, expected: str
) -> None:
    config = RewardConfig(kind="model", model_path=save_tokenizer(tmp_path, None), request_deadline_s=20.0)
    server.answer = lambda path, payload: reply
    with pytest.raises(RewardError, match=f"{server.url}/classify: {expected}"):
        RewardModel(config, [server.url])([rollout("a", "b")])
