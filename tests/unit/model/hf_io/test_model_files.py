"""What is copied from one model directory to another beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.model.hf_io.model_files import copy_model_files
from tests.support.tokenizer_dirs import write_fast, write_sentencepiece

CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    write_fast(directory, template="{{ messages[0].content }}")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return value


def names(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def test_config_tokenizer_and_templates_are_copied_and_nothing_else(source: Path, tmp_path: Path) -> None:
    wanted = {"generation_config.json", "merges.txt", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja"}
    unwanted = {
        *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "own.py", "README.md"),
        *("hf_quant_config.json", "quantize_config.json", "checkpoint-5/config.json", ".cache/a.jinja"),
    }
    for name in wanted | unwanted:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    copy_model_files(source, tmp_path / "a" / "out", dtype=None)
    assert names(tmp_path / "a" / "out") == wanted | copied
    copy_model_files(source, tmp_path / "code", dtype=None, include_code=True)
    assert names(tmp_path / "code") == wanted | copied | {"own.py"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_type_is_set_under_the_name_that_the_config_uses(
    before: dict[str, str], after: dict[str, str], source: Path, tmp_path: Path
) -> None:
    (source / "config.json").write_text(json.dumps({"architectures": ["X"], **before}))
    copy_model_files(source, tmp_path / "out", dtype="bfloat16")
    assert read_config(tmp_path / "out") == {"architectures": ["X"], **after}


def test_the_sources_quantization_is_not_claimed_for_the_new_weights(source: Path, tmp_path: Path) -> None:
    old = {"quantization_config": {"quant_method": "gptq"}, "compression_config": {"format": "int"}}
    (source / "config.json").write_text(json.dumps(CONFIG | old))
    copy_model_files(source, tmp_path / "plain", dtype=None)
    assert read_config(tmp_path / "plain") == CONFIG
    new = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    copy_model_files(source, tmp_path / "fp8", dtype=None, quantization=new)
    assert read_config(tmp_path / "fp8") == CONFIG | {"quantization_config": new}


def test_read_only_sources_give_files_that_can_be_written(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        file.chmod(0o444)
    copy_model_files(source, tmp_path / "out", dtype="bfloat16")
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "out").iterdir())


def test_links_of_a_download_cache_are_copied_as_files(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (source / "tokenizer.json").rename(blob)
    (source / "tokenizer.json").symlink_to(blob)
    copy_model_files(source, tmp_path / "out", dtype=None)
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert load_tokenizer(tmp_path / "out").encode("1") == load_tokenizer(source).encode("1")


def test_a_raw_sentencepiece_model_becomes_loadable(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "raw", "unigram")
    copy_model_files(source, tmp_path / "out", dtype="bfloat16")
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} < names(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode(" 12 plus\n") == load_tokenizer(source).encode(" 12 plus\n")


def test_a_tokenizer_json_beside_a_sentencepiece_model_is_kept(source: Path, tmp_path: Path) -> None:
    raw = write_sentencepiece(tmp_path / "raw", "bpe")
    (source / "tokenizer.model").write_bytes((raw / "tokenizer.model").read_bytes())
    copy_model_files(source, tmp_path / "out", dtype=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()


@pytest.mark.parametrize("text", [None, "{}", '{"architectures": []}', "[1]", "{"])
def test_a_config_that_describes_no_model_is_named_before_anything_is_written(
    text: str | None, source: Path, tmp_path: Path
) -> None:
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"source/config\.json: "):
        copy_model_files(source, tmp_path / "out", dtype=None)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_is_copied_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    copy_model_files(source, tmp_path / "out", dtype=None)
    assert (tmp_path / "out" / "config.json").is_file() and "holds no tokenizer" in caplog.text
