"""A raw sentencepiece model written as tokenizer.json: transformers must read every text as sentencepiece does."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_rpp.data.sentencepiece_export import write_fast_tokenizer
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_dirs import CORPUS, NORMALIZATIONS, write_sentencepiece

TEXTS = (
    *("12 plus 3 is 15.", " leading", "  two  and   three ", "", " ", "a\nb\n\n c\t\r\n", "café CAFÉ naïve", "日本 x"),
    *("🙂👍🏽 e\u0301", "\ufb01\u00bd\u00a0\u200b\u3000", "\u2581a \u2581", "<0x0A> <0xAF>", "a <think> b<think>c"),
    *("<s>[INST] hi </s><s>", "<unk>1", " <s> 2 ", "\x00\x7f", "aaaaaaaaaaa", "def f(x):\n    return x"),
)
BOS = 1
Pair = tuple[Tokenizer, Any, Tokenizer]


def exported(source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", out)
    write_fast_tokenizer(source, out)
    return out


@pytest.fixture(scope="module", params=[(k, n) for k in ("bpe", "unigram") for n in NORMALIZATIONS], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Ours of the raw model; transformers' and ours of the exported directory."""
    source = write_sentencepiece(tmp_path_factory.mktemp("raw"), *request.param)
    out = exported(source, source / "out")
    return load_tokenizer(source), AutoTokenizer.from_pretrained(str(out)), load_tokenizer(out)


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_encodes_and_decodes_as_sentencepiece_does(text: str, pair: Pair) -> None:
    ours, theirs, again = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids == again.encode(text)
    if ids[:1] != [BOS]:  # they would put a second one before it
        assert theirs.encode(text) == ours.encode_prompts([text], chat=False)[0] == [BOS, *ids]
    assert again.encode_prompts([text], chat=False) == ours.encode_prompts([text], chat=False)
    assert again.decode(ids) == ours.decode(ids)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.sampled_from("".join(sorted(set("".join(CORPUS)))) + "  \n\tz日🙂"), max_size=40))
def test_any_text_gets_the_same_ids(text: str, pair: Pair) -> None:
    ours, theirs, _ = pair
    ids, expected = theirs.encode(text, add_special_tokens=False), ours.encode(text)
    # Two orders of the same pieces have one score, and only sentencepiece's float32 rounding tells them apart.
    is_tie = type(theirs.backend_tokenizer.model).__name__ == "Unigram" and sorted(ids) == sorted(expected)
    assert ids == expected or is_tie


def test_pieces_that_spell_the_name_of_a_byte_are_not_joined_to_that_byte(tmp_path: Path) -> None:
    halves = [f"{c}{half}{c}" for c in "abcdefghijklmnopqrstuvwxyz" for half in ("<0x0", "A>") for _ in range(40)]
    settings = {"split_by_unicode_script": False, "split_by_number": False}
    source = write_sentencepiece(tmp_path / "raw", "bpe", lines=halves, **settings)
    model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert model.encode("a<0x0A>", out_type=str)[-2:] == ["<0x0", "A>"]
    theirs = AutoTokenizer.from_pretrained(str(exported(source, tmp_path / "out")))
    assert theirs.encode("a<0x0A>", add_special_tokens=False) == model.encode("a<0x0A>")


def test_the_exported_directory_keeps_end_padding_and_size(pair: Pair) -> None:
    ours, _, again = pair
    assert again.eos_token_ids == ours.eos_token_ids == (2,)
    assert (again.pad_token_id, again.vocab_size) == (ours.pad_token_id, ours.vocab_size)


def test_padding_and_the_chat_template_are_exported(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "raw", "bpe", pad_id=4, pad_piece="<pad>", control_symbols=[])
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}{{ eos_token }}{% endfor %}"
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, again = load_tokenizer(source), load_tokenizer(exported(source, tmp_path / "out"))
    assert again.pad_token_id == ours.pad_token_id == 4
    assert again.render_chat("hi") == ours.render_chat("hi") == "<s>[INST] hi</s>"
    assert again.apply_chat_template("hi") == ours.apply_chat_template("hi")


def test_a_model_without_bos_in_its_config_gets_none_in_the_export(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "raw", "bpe")
    (source / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(str(exported(source, tmp_path / "out")))
    assert theirs.encode("1 plus") == load_tokenizer(source).encode("1 plus")


def test_a_text_that_transformers_reads_otherwise_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_sentencepiece(tmp_path / "raw", "bpe")
    with caplog.at_level(logging.WARNING):
        exported(source, tmp_path / "out")
        assert not caplog.records
        (source / "config.json").write_text(
            '{"model_type": "qwen2"}'
        )  # transformers takes Qwen2Tokenizer whatever we say
        exported(source, tmp_path / "out")
    assert "transformers reads 'Hello, world' otherwise" in caplog.text


def test_a_kind_of_model_without_counterpart_says_what_to_do(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "raw", "char", byte_fallback=False)
    with pytest.raises(ValueError, match=r"tokenizer\.model: only unigram and BPE .* put the model's own"):
        exported(source, tmp_path / "out")
