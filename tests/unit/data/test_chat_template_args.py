"""What a chat template is given beside the conversation, and prompts that open the thought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.prompts import load_demonstrations, load_prompts
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rpp.experience.types import Prompt
from tests.support.tokenizer_dirs import write_fast, write_sentencepiece

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}answer:{% endif %}{% endif %}"
)
OFF: dict[str, Any] = {"enable_thinking": False}


def write_thinker(directory: Path) -> Path:
    """A tokenizer with `<think>` as DeepSeek's and Qwen's have it: a token, but not a special one."""
    write_fast(directory, template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")
    return str(path)


def prompt_of(questions: str, tokenizer: Tokenizer, data: DataConfig) -> Prompt:
    [prompt] = load_prompts(SourceConfig(path=questions), data, tokenizer, max_prompt_tokens=100)
    return prompt


def test_a_prompt_whose_template_opens_the_thought_says_so(tmp_path: Path, questions: str) -> None:
    directory, chat = write_thinker(tmp_path / "model"), DataConfig(chat_template=True)
    opened = prompt_of(questions, load_tokenizer(directory), chat)
    assert opened.opens_thought and opened.text == "1+1"
    assert not prompt_of(questions, load_tokenizer(directory, chat_template_args=OFF), chat).opens_thought
    assert not prompt_of(questions, load_tokenizer(directory), DataConfig()).opens_thought
    written = DataConfig(prompt_template="{prompt}\n<think>\n")
    assert prompt_of(questions, load_tokenizer(directory), written).opens_thought


def test_prompts_and_demonstrations_are_rendered_with_the_arguments(tmp_path: Path, questions: str) -> None:
    data = DataConfig(chat_template=True)
    tokenizer = load_tokenizer(write_thinker(tmp_path / "model"), chat_template_args=OFF)
    wanted = tokenizer.encode("user:1+1\nanswer:")
    assert list(prompt_of(questions, tokenizer, data).token_ids) == wanted
    assert load_demonstrations(questions, tokenizer, data)[0][0] == wanted


def test_the_template_of_a_raw_sentencepiece_model_reads_them_too(tmp_path: Path) -> None:
    directory = write_sentencepiece(tmp_path, "bpe")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(directory).render_chat("hi") == "user:hi\n<think>\n"
    assert load_tokenizer(directory, chat_template_args=OFF).render_chat("hi") == "user:hi\nanswer:"


@pytest.mark.parametrize("is_raw", [False, True])
def test_arguments_that_no_template_reads_are_refused(tmp_path: Path, is_raw: bool) -> None:
    if is_raw:
        write_sentencepiece(tmp_path, "bpe")
    else:
        write_fast(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template; leave data\.chat_template_args empty"):
        load_tokenizer(tmp_path, chat_template_args=OFF)
    thinker = write_thinker(tmp_path / "thinker")
    with pytest.raises(ValueError, match=r"data\.chat_template_args: .* does not read `enable_thinkin`"):
        load_tokenizer(thinker, chat_template_args={"enable_thinkin": False})
