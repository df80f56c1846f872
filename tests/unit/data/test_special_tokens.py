"""The ids that end a response, and the one that pads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.data.special_tokens import pad_id, turn_end_token
from megatron_rpp.data.tokenizer import check_vocabulary, load_tokenizer
from tests.support.tokenizer_dirs import write_fast

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"  # marks beginnings alone
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (  # gpt-oss: the last answer ends otherwise than one inside a conversation
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
VICUNA = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # no special token anywhere
REFUSES = "{{ raise_exception('system turn missing') }}"


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (GLM, ("<|user|>", "<|assistant|>"), "<|user|>"),
        (MISTRAL, ("[INST]", "[/INST]"), "<eos>"),
        (HARMONY, ("<|start|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>"),
        (VICUNA, ("<|user|>",), "<eos>"),
        (REFUSES, ("<|user|>",), "<eos>"),
    ],
)
def test_a_response_ends_where_the_chat_template_ends_the_assistants_turn(
    template: str, special: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    ids = write_fast(tmp_path, *special, template=template)
    assert load_tokenizer(tmp_path).eos_token_ids[0] == ids[expected]


def test_the_end_of_turn_comes_first_though_generation_config_lists_another_before_it(tmp_path: Path) -> None:
    ids = write_fast(tmp_path, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", template=LLAMA3)
    listed = [ids["<eos>"], ids["<|eot_id|>"]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert load_tokenizer(tmp_path).eos_token_ids == (ids["<|eot_id|>"], ids["<eos>"])


def test_the_longest_special_token_wins() -> None:
    def render(turns: list[dict[str, str]]) -> str:
        return "".join(f"{turn['content']}<|end|>more" for turn in turns)

    assert turn_end_token(render, ["<|end|>", "<|end|>more"]) == "<|end|>more"


def test_what_begins_a_text_ends_no_turn() -> None:
    def render(turns: list[dict[str, str]]) -> str:
        return "".join(f"<s>{turn['content']}" for turn in turns)

    assert turn_end_token(render, ["<s>"], never=["<s>"]) is None
    assert turn_end_token(render, ["<s>"]) == "<s>"


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], True, 1.5])
def test_an_end_id_that_is_no_id_names_the_file(value: object, tmp_path: Path) -> None:
    write_fast(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is .*; write a token id"):
        load_tokenizer(tmp_path)


def test_a_json_file_that_holds_no_object_is_named(tmp_path: Path) -> None:
    write_fast(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config\.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_without_any_end_token_loading_fails(tmp_path: Path) -> None:
    write_fast(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no response could ever stop; set eos_token_id"):
        load_tokenizer(tmp_path)


def test_padding_falls_back_to_tokens_that_no_text_uses(tmp_path: Path) -> None:
    special = {"<|reserved_0|>": 9, "<|finetune_right_pad_id|>": 8, "<s>": 1}
    assert pad_id(tmp_path, 4, special, 0, (2,)) == 4
    assert pad_id(tmp_path, None, special, 0, (2,)) == 8
    assert pad_id(tmp_path, -1, {"<|reserved_0|>": 9}, 0, (2,)) == 9  # sentencepiece says -1 for none
    assert pad_id(tmp_path, None, {"<s>": 1}, 0, (2,)) == 0
    assert pad_id(tmp_path, None, {}, None, (2, 3)) == 2


def test_padding_of_the_model_config_comes_before_a_guess_unless_it_means_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"pad_token_id": 5}')
    assert pad_id(tmp_path, None, {"<pad>": 8}, 0, (2,)) == 5
    (tmp_path / "config.json").write_text('{"pad_token_id": -1}')
    assert pad_id(tmp_path, None, {"<pad>": 8}, 0, (2,)) == 8


def test_a_tokenizer_larger_than_the_embedding_names_its_file_and_both_numbers(tmp_path: Path) -> None:
    size = len(write_fast(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    check_vocabulary(tokenizer, size, tmp_path)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: the tokenizer has {size} tokens, .* is {size - 1};"):
        check_vocabulary(tokenizer, size - 1, tmp_path)


def test_an_end_token_past_the_embedding_is_found(tmp_path: Path) -> None:
    size = len(write_fast(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": size, "model_type": "llama"}))
    tokenizer = load_tokenizer(tmp_path)
    check_vocabulary(tokenizer, size + 1, tmp_path)
    with pytest.raises(ValueError, match=rf"token {size} is not below the model's vocab_size, which is {size}"):
        check_vocabulary(tokenizer, size, tmp_path)
