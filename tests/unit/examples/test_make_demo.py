"""The demo's start: what the tutorial trains on must load, decode and be reproducible."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.prompts import load_demonstrations, load_prompts
from megatron_rpp.data.tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "make_demo.py"
SMALL = ("--demonstrations", "4000", "--hidden", "48", "--layers", "1", "--ffn", "64", "--eval-size", "100")


def make(out: Path, *arguments: str) -> None:
    before, sys.argv = sys.argv, [str(SCRIPT), "--out", str(out), *SMALL, *arguments]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before


def digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    make(out)
    return out


def test_the_same_seed_writes_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    make(tmp_path)
    assert digests(tmp_path) == digests(demo)


def test_the_tokenizer_decodes_digits_without_spaces(demo: Path) -> None:
    tokenizer = load_tokenizer(demo / "init")
    ids = tokenizer.encode("12 + 34=")
    assert len(ids) == 8
    assert tokenizer.decode([*ids, 1, 0, 0]) == "12 + 34="
    assert (tokenizer.pad_token_id, tokenizer.eos_token_ids) == (0, (1,))


def test_the_model_loads_and_its_vocabulary_covers_the_tokenizer(demo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(demo / "init"))
    assert model.config.vocab_size >= load_tokenizer(demo / "init").vocab_size
    assert not model.config.tie_word_embeddings
    assert model(torch.tensor([[2, 3]])).logits.shape == (1, 2, 32)


def test_demonstrations_have_the_prompts_of_training(demo: Path) -> None:
    data = DataConfig(prompt_template="{expression}=")
    tokenizer = load_tokenizer(demo / "init")
    pairs = load_demonstrations(demo / "demonstrations.jsonl", tokenizer, data, max_tokens=16)
    source = SourceConfig(path=str(demo / "train.jsonl"))
    prompts = {p.token_ids for p in load_prompts(source, data, tokenizer, max_prompt_tokens=8)}
    assert len(pairs) == 4000
    assert {tuple(prompt) for prompt, _ in pairs} <= prompts
    assert all(response[-1] == 1 and response.count(1) == 1 for _, response in pairs)


def test_half_of_the_answers_are_off_by_one_two_or_ten(demo: Path) -> None:
    errors = [int(d["response"]) - eval(d["expression"]) for d in read(demo / "demonstrations.jsonl")]
    assert set(errors) == {0, 1, -1, 2, -2, 10, -10}
    assert 0.46 < sum(e != 0 for e in errors) / len(errors) < 0.54  # 0.5 +- 5 standard errors


def test_held_out_sums_are_in_no_other_file_and_answered_right(demo: Path) -> None:
    held_out = {d["expression"] for d in read(demo / "eval.jsonl")}
    assert len(held_out) == 100
    for name in ("train.jsonl", "demonstrations.jsonl"):
        assert not held_out & {d["expression"] for d in read(demo / name)}
    for name in ("train.jsonl", "eval.jsonl"):
        assert all(eval(d["expression"]) == int(d["answer"]) for d in read(demo / name))


@pytest.mark.parametrize("arguments", [("--wrong-fraction", "1.5"), ("--eval-size", "9000")])
def test_a_bad_flag_is_named(tmp_path: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match=" ".join(arguments)):
        make(tmp_path, *arguments)
    assert not any(tmp_path.iterdir())
