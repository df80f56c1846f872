"""Tokenizers: the ids that training and sampling both rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from megatron_rpp.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = ["<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", *"0123456789+= \n", *"useraitn"]
IDS = {token: i for i, token in enumerate(dict.fromkeys(VOCABULARY))}


def write_tokenizer(directory: Path, chat_template: str | None = None) -> Path:
    raw = RawTokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def test_decode_gives_back_the_text_without_spaces_or_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode("12+ 3=")
    assert ids == [IDS[c] for c in "12+ 3="]
    assert tokenizer.decode([*ids, IDS["<eos>"], IDS["<pad>"]]) == "12+ 3="
    assert tokenizer.pad_token_id == IDS["<pad>"]
    assert tokenizer.vocab_size == len(IDS)


def test_encode_many_equals_encode(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    texts = ["1", "23+4=", ""]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many([]) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),  # the tokenizer's own
        ({"config.json": 5}, (5,)),
        ({"config.json": 5, "generation_config.json": [7, 6]}, (7, 6)),
        ({"config.json": 5, "generation_config.json": None}, (5,)),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, files: dict[str, object], expected: tuple[int, ...]
) -> None:
    write_tokenizer(tmp_path)
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value, "model_type": "llama"}))
    assert load_tokenizer(tmp_path).eos_token_ids == expected


def test_a_chatml_model_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, CHATML))
    assert tokenizer.eos_token_ids == (IDS["<|im_end|>"], IDS["<eos>"])


def test_chat_template_wraps_the_text_as_a_user_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, CHATML))
    assert tokenizer.render_chat("1+1") == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template("1+1")
    assert ids[0] == IDS["<|im_start|>"] and ids.count(IDS["<|im_end|>"]) == 1
    assert ids[-1] == IDS["\n"]


def test_a_tokenizer_without_chat_template_says_which_key_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.chat_template = false"):
        load_tokenizer(write_tokenizer(tmp_path)).render_chat("1")


def test_a_missing_directory_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone: no such directory; set model\.path"):
        load_tokenizer(tmp_path / "gone")


def test_a_directory_without_tokenizer_says_which_files_to_copy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json .* tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_a_value_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(f"{i} plus {j} is {i + j}" for i in range(30) for j in range(30)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "tokenizer"), vocab_size=60, pad_id=3, minloglevel=2
    )
    return directory


def test_a_raw_sentencepiece_model_encodes_and_decodes(sentencepiece_directory: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory)
    ids = tokenizer.encode("12 plus 3")
    assert tokenizer.decode([1, *ids, 2, 3]) == "12 plus 3"
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.pad_token_id == 3
    assert tokenizer.vocab_size == 60
    assert tokenizer.encode_many(["12 plus 3", "4"]) == [ids, tokenizer.encode("4")]


def test_a_generation_config_beside_sentencepiece_is_read(sentencepiece_directory: Path) -> None:
    file = sentencepiece_directory / "generation_config.json"
    file.write_text('{"eos_token_id": [2, 9]}')
    try:
        assert load_tokenizer(sentencepiece_directory).eos_token_ids == (2, 9)
    finally:
        file.unlink()


def test_a_conversation_is_rendered_turn_by_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, CHATML))
    turns = [{"role": "system", "content": "1"}, {"role": "user", "content": "1+1"}]
    rendered = "<|im_start|>system\n1<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(turns) == rendered
    assert tokenizer.encode_prompts([turns, "1+1"], chat=True) == [
        tokenizer.encode(rendered),
        tokenizer.apply_chat_template("1+1"),
    ]


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    only_user = "{% if messages[0].role != 'user' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, only_user))
    with pytest.raises(ValueError, match=r"the chat template refuses .*'role': 'system'.*: no system turns"):
        tokenizer.render_chat([{"role": "system", "content": "1"}])
