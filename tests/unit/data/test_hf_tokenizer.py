"""Hugging Face tokenizers: BOS, ids with holes, and code that must not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rpp.config.data import DataConfig
from megatron_rpp.data.prompts import load_demonstrations
from megatron_rpp.data.tokenizer import load_tokenizer
from tests.support.tokenizer_dirs import write_fast

WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_plain_text_gets_the_bos_that_transformers_gives_it(tmp_path: Path) -> None:
    ids = write_fast(tmp_path, bos=True)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert load_tokenizer(tmp_path).encode_prompts(["1+1=", ""], chat=False) == [theirs.encode(t) for t in ("1+1=", "")]
    assert theirs.encode("1")[0] == ids["<bos>"]


def test_plain_text_gets_no_bos_from_a_tokenizer_that_adds_none(tmp_path: Path) -> None:
    ids = write_fast(tmp_path)
    assert load_tokenizer(tmp_path).encode_prompts(["1+"], chat=False) == [[ids["1"], ids["+"]]]


def test_a_bos_that_the_text_or_the_chat_template_writes_is_not_doubled(tmp_path: Path) -> None:
    ids = write_fast(tmp_path, template=WITH_BOS, bos=True)
    tokenizer = load_tokenizer(tmp_path)
    [chat] = tokenizer.encode_prompts(["1"], chat=True)
    [text] = tokenizer.encode_prompts(["<bos>1"], chat=False)
    assert chat == [ids["<bos>"], *(ids[c] for c in "user:1\n")] == tokenizer.apply_chat_template("1")
    assert text == [ids["<bos>"], ids["1"]]


def test_an_end_of_sequence_that_the_tokenizer_adds_does_not_end_a_prompt(tmp_path: Path) -> None:
    ids = write_fast(tmp_path, bos=True)
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
    raw["post_processor"]["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [ids["<eos>"]], "tokens": ["<eos>"]}
    file.write_text(json.dumps(raw))
    assert AutoTokenizer.from_pretrained(str(tmp_path)).encode("1")[-1] == ids["<eos>"]
    assert load_tokenizer(tmp_path).encode_prompts(["1"], chat=False) == [[ids["<bos>"], ids["1"]]]


@pytest.mark.parametrize(
    ("in_file", "asked", "added"),
    [(False, True, True), (False, None, True), (False, False, False), (True, False, True), (True, True, True)],
)
def test_add_bos_token_of_a_llama_tokenizer_is_obeyed_though_transformers_5_drops_it(
    in_file: bool, asked: bool | None, added: bool, tmp_path: Path
) -> None:
    ids = write_fast(tmp_path, bos=in_file)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", add_bos_token=asked)
    [prompt] = load_tokenizer(tmp_path).encode_prompts(["1"], chat=False)
    assert (prompt[0] == ids["<bos>"]) == added


def test_the_response_of_a_demonstration_has_no_bos(tmp_path: Path) -> None:
    ids = write_fast(tmp_path, bos=True)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    data = DataConfig(prompt_template="{prompt}", chat_template=False)
    [(_, response)] = load_demonstrations(tmp_path / "data.jsonl", load_tokenizer(tmp_path), data)
    assert response == [ids["2"], ids["<eos>"]]


def test_vocab_size_reaches_past_an_id_behind_a_hole(tmp_path: Path) -> None:
    size = len(write_fast(tmp_path))
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["Q"] = size + 10
    file.write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).vocab_size == size + 11


CODE = """
from pathlib import Path
Path("{witness}").write_text("ran")
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def write_remote(directory: Path, tokenizer_class: str | None = "OwnTokenizer") -> Path:
    """A directory whose tokenizer, and configuration, are code of its own; the file that shows that it ran."""
    write_fast(directory)
    witness = directory / "witness"
    (directory / "own.py").write_text(CODE.format(witness=witness))
    (directory / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class=tokenizer_class,
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    return witness


@pytest.mark.parametrize("tokenizer_class", ["OwnTokenizer", None])
def test_a_tokenizer_of_remote_code_says_which_setting_runs_it_and_does_not_run(
    tokenizer_class: str | None, tmp_path: Path
) -> None:
    witness = write_remote(tmp_path, tokenizer_class)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .* set model\.trust_remote_code=true"):
        load_tokenizer(tmp_path)
    assert not witness.exists()


def test_a_model_type_that_transformers_knows_does_not_stand_in_for_remote_code(tmp_path: Path) -> None:
    witness = write_remote(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # transformers would take Qwen2Tokenizer
    with pytest.raises(ValueError, match=r"model\.trust_remote_code=true"):
        load_tokenizer(tmp_path)
    assert not witness.exists()


def test_a_tokenizer_with_code_beside_a_standard_class_loads_without_the_code(tmp_path: Path) -> None:
    witness = write_remote(tmp_path, "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("1+1")) == "1+1"
    assert not witness.exists()


def test_remote_code_runs_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    directory = tmp_path / "model"
    witness = write_remote(directory)
    (directory / "config.json").unlink()
    assert load_tokenizer(directory, trust_remote_code=True).decode([3]) != ""
    assert witness.read_text() == "ran"


def test_a_tokenizer_that_is_not_fast_encodes_many_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fast(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    fast = tokenizer.encode_many(["1+1", ""])
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert tokenizer.encode_many(["1+1", ""]) == fast
