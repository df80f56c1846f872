"""Raw sentencepiece models: a directory with tokenizer.model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_rpp.data.tokenizer import load_tokenizer
from tests.support.tokenizer_dirs import write_sentencepiece

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
UNK, BOS, EOS, INST = 0, 1, 2, 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("trained"), "bpe")


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def own(trained: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))


@pytest.mark.parametrize("text", ["12 plus 3", "  two  spaces ", "a\n\nb\t", "日本🙂", "", "<think> 1", "<0x0A>"])
def test_text_is_encoded_and_decoded_as_sentencepiece_does(
    text: str, directory: Path, own: sentencepiece.SentencePieceProcessor
) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode(text) == own.encode(text)
    assert tokenizer.encode_many([text]) == [own.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_of_control_pieces_stand_for_them_and_text_between_them_is_encoded_by_itself(
    directory: Path, own: sentencepiece.SentencePieceProcessor
) -> None:
    tokenizer = load_tokenizer(directory)
    expected = [BOS, INST, *own.encode(" 1 plus"), EOS, UNK, *own.encode("2")]
    assert tokenizer.encode("<s>[INST] 1 plus</s><unk>2") == expected


def test_decode_skips_control_and_unknown_pieces(directory: Path, own: sentencepiece.SentencePieceProcessor) -> None:
    assert load_tokenizer(directory).decode([BOS, INST, *own.encode("1 plus"), UNK, EOS]) == "1 plus"


def test_plain_text_gets_the_bos_that_config_json_names_and_only_once(
    directory: Path, own: sentencepiece.SentencePieceProcessor
) -> None:
    texts = ["1 plus", "<s>1 plus"]
    assert load_tokenizer(directory).encode_prompts(texts, chat=False) == [[BOS, *own.encode("1 plus")]] * 2
    (directory / "config.json").write_text('{"bos_token_id": null}')
    assert load_tokenizer(directory).encode_prompts(texts[:1], chat=False) == [own.encode("1 plus")]


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_beside_the_model_is_rendered_with_its_tokens(
    name: str, directory: Path, own: sentencepiece.SentencePieceProcessor
) -> None:
    (directory / name).write_text(LLAMA2 if name.endswith("jinja") else json.dumps({"chat_template": LLAMA2}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.render_chat(" hi ") == "<s>[INST] hi [/INST]"
    expected = [BOS, INST, *own.encode(" hi [/INST]")]
    assert tokenizer.encode_prompts([" hi "], chat=True) == [expected] == [tokenizer.apply_chat_template(" hi ")]
    assert tokenizer.eos_token_ids == (EOS,)


def test_the_end_of_the_assistants_turn_is_found_among_control_pieces(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}[INST]{% endfor %}")
    assert load_tokenizer(directory).eos_token_ids == (INST, EOS)


def test_without_a_chat_template_the_error_says_what_to_add(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"add chat_template\.jinja or set data\.chat_template = false"):
        load_tokenizer(directory).render_chat("1")


def test_a_chat_template_runs_in_a_sandbox(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        load_tokenizer(directory).render_chat("1")


def test_the_unknown_piece_pads_where_the_model_has_no_padding(directory: Path) -> None:
    assert load_tokenizer(directory).pad_token_id == UNK


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken, as Llama 3's original files
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_conversation_is_rendered_turn_by_turn(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}")
    turns = [{"role": "system", "content": "1"}, {"role": "user", "content": "hi"}]
    assert load_tokenizer(directory).render_chat(turns) == "system:1 user:hi "
