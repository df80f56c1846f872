"""One random model and one real SGLang server for all integration tests."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.support.servers import running

LAST = "test_stop_leaves_no_process"  # it ends the session's server
PAD, EOS = 0, 1
ALPHABET = ["<pad>", "<eos>", *string.digits, *"+-*="]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == LAST)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama and its character-level tokenizer, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(7)
    shape = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # so that logits differ enough for greedy tokens to be stable
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sglang_server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """A running server with the tiny model in float32."""
    rollout = RolloutConfig(context_length=256, max_response_tokens=64)
    log_path = tmp_path_factory.mktemp("server") / "sglang.log"
    with running(SGLangServer(str(tiny_model_dir), rollout, dtype="float32", log_path=log_path)) as server:
        yield server
