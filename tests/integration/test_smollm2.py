"""A real pretrained model through conversion and back, and the same greedy text from all three engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.support.rank_server import run_ranks
from tests.support.servers import running

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "Why is the sky blue?", "2 + 3 =")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16."""
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    command = [sys.executable, "examples/make_smollm2.py", "--out", str(path), "--dtype", "bfloat16"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return path


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    path = source.parent / "megatron"
    assert hf_to_megatron.main(["--hf", str(source), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def exported(megatron: Path) -> Path:
    path = megatron.parent / "exported"
    assert megatron_to_hf.main(["--megatron", str(megatron), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def prompts(source: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(source)
    return [tokenizer.apply_chat_template(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(source: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens, the end token and what follows it cut off."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(until_end(source, out[0, len(prompt) :].tolist()))
    assert all(answers) and len({tuple(answer) for answer in answers}) == len(QUESTIONS)
    return answers


def until_end(source: Path, tokens: list[int]) -> list[int]:
    ends = [tokens.index(end) for end in load_tokenizer(source).eos_token_ids if end in tokens]
    return tokens[: min(ends, default=len(tokens))]


def test_real_weights_come_back_bit_for_bit(source: Path, exported: Path) -> None:
    before, after = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16, name
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"tensor": 3}], ids=["pp2", "tp3"])
def test_megatron_writes_the_text_that_transformers_writes(
    source: Path,
    megatron: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    layout: dict[str, int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "answers.json"
    arguments = {
        "model": str(megatron),
        "layout": layout,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "out": str(out),
    }
    run_ranks("tests.integration.greedy_worker", [json.dumps(arguments)], max(layout.values()), tmp_path)
    assert [until_end(source, answer) for answer in json.loads(out.read_text())] == expected


def test_sglang_writes_the_text_that_transformers_writes_from_the_exported_directory(
    source: Path, exported: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    rollout = RolloutConfig(context_length=256, max_response_tokens=NEW_TOKENS, max_total_tokens=2048)
    tokenizer = load_tokenizer(exported)
    sampling = SamplingParams(
        num_samples_per_prompt=1,
        max_response_tokens=NEW_TOKENS,
        temperature=0.0,
        top_p=1.0,
        stop_token_ids=tokenizer.eos_token_ids,
        seed=0,
    )
    with running(SGLangServer(str(exported), rollout, dtype="float32", log_path=tmp_path / "sglang.txt")) as server:
        asked = [Prompt(i, text, tuple(ids), "") for i, (text, ids) in enumerate(zip(QUESTIONS, prompts, strict=True))]
        rollouts = SGLangClient([server.url], rollout, tokenizer.decode).generate(asked, sampling)
    assert [until_end(source, list(rollout.response_ids)) for rollout in rollouts] == expected
    reference = AutoTokenizer.from_pretrained(source)
    assert [r.text for r in rollouts] == [reference.decode(ids, skip_special_tokens=True) for ids in expected]
