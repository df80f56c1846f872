"""Packing, padding and layout change neither the losses of `rpp sft` nor the model that it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.sft_worker import CASES, LONGEST, MODES, STEPS
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import SHAPE
from tests.support.tokenizer_dirs import write_fast

REFERENCE = ("dp2", "padded")
Found = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny Llama with a tokenizer, and of demonstrations of very different lengths, of which some are long."""
    root = tmp_path_factory.mktemp("sft")
    torch.manual_seed(7)
    ids = write_fast(root / "init")
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(ids)}, tie_word_embeddings=False)).save_pretrained(
        root / "init"
    )
    chance = random.Random(1)
    with (root / "demonstrations.jsonl").open("w") as file:
        for i in range(40):
            length = LONGEST - 6 if i % 5 == 0 else chance.randrange(1, 6)
            response = "".join(chance.choices("0123456789+=", k=length))
            file.write(json.dumps({"prompt": "12+3="[: 1 + i % 5], "response": response}) + "\n")
    run_ranks("tests.distributed.sft_worker", [str(root)], 2, root)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    return {(name, mode): json.loads((root / f"{name}-{mode}.json").read_text()) for name, mode in CASES}


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    """Of a model directory, in one file or in one a stage."""
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("case", [case for case in CASES if case != REFERENCE], ids="-".join)
def test_packing_and_layout_change_neither_losses_nor_weights(root: Path, found: Found, case: tuple[str, str]) -> None:
    expected, steps = found[REFERENCE], found[case]
    assert len(steps) == len(expected) == STEPS and expected[0]["grad_norm"] > 0.01
    assert {step["micro_batch_tokens"] for step in steps} == {MODES[case[1]]}
    for step, wanted in zip(steps, expected, strict=True):
        for name in ("loss/total", "grad_norm"):
            assert step[name] == pytest.approx(wanted[name], rel=1e-5), name
    start, before, after = (weights_in(root / name) for name in ("init", "-".join(REFERENCE), "-".join(case)))
    assert after.keys() == before.keys() == start.keys()
    assert max(float((before[name] - x).abs().max()) for name, x in start.items()) > 1e-3, "nothing was learnt"
    for name, weight in before.items():
        torch.testing.assert_close(
            after[name], weight, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
