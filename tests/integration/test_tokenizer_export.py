"""SGLang's own loader reads an exported directory as the trainer reads its source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.model.hf_io.model_files import copy_model_files
from megatron_rpp.rollout.server_command import server_environment
from tests.support.tokenizer_dirs import write_sentencepiece

TEXTS = ["12 plus 3", "  two  spaces ", "a\n\nb\t", "日本🙂", "", "1 <think> 2", "<0x0A>", "a</s>[INST] b<unk>"]
# In a process of its own: with the stand-ins of device/sglang_cpu in front, as the server runs.
ENCODE = """
import json, sys
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
tokenizer = get_tokenizer(sys.argv[1])
texts = json.loads(sys.argv[2])
print(json.dumps([[tokenizer.encode(t), tokenizer.encode(t, add_special_tokens=False)] for t in texts]))
"""


def sglang_ids(directory: Path, texts: list[str]) -> list[list[list[int]]]:
    environment = server_environment(os.environ, RolloutConfig(), "cpu")
    argv = [sys.executable, "-c", ENCODE, str(directory), json.dumps(texts)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    value: list[list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return value


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sglang_reads_an_exported_sentencepiece_model_as_the_trainer_reads_its_source(
    kind: str, tmp_path: Path
) -> None:
    source = write_sentencepiece(tmp_path / "source", kind)
    copy_model_files(source, tmp_path / "out", dtype="bfloat16")
    tokenizer = load_tokenizer(source)
    prompts, plain = tokenizer.encode_prompts(TEXTS, chat=False), tokenizer.encode_many(TEXTS)
    assert sglang_ids(tmp_path / "out", TEXTS) == [list(both) for both in zip(prompts, plain, strict=True)]


@pytest.mark.parametrize(("in_file", "asked"), [(False, True), (False, None), (False, False), (True, False)])
def test_sglang_and_the_trainer_agree_on_the_bos_of_a_llama_tokenizer(
    in_file: bool, asked: bool | None, tmp_path: Path
) -> None:
    source = write_sentencepiece(tmp_path / "source", "bpe")
    if not in_file:  # then tokenizer.json adds none
        (source / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    copy_model_files(source, tmp_path / "out", dtype="bfloat16")
    file = tmp_path / "out" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": asked}
    file.write_text(json.dumps(config))
    prompts = load_tokenizer(tmp_path / "out").encode_prompts(["12 plus"], chat=False)
    assert [ids for ids, _ in sglang_ids(tmp_path / "out", ["12 plus"])] == prompts
