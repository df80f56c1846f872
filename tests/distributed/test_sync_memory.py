"""How far a verified sync raises a trainer rank's resident memory, in units of weight_sync.bucket_mb.

Threads, sockets and Python take some MiB of it, whatever a bucket holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.distributed.test_sync_experts import receiver
from tests.support.rank_server import run_ranks

SHAPE = {"vocab_size": 1024, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}


def peak_buckets(folder: Path, bucket_mb: int, *settings: str) -> float:
    """Of the worse of two ranks that sync the model in FOLDER/model to a receiver, as the benchmark measures it."""
    result = folder / "result.json"
    (folder / "received").mkdir()
    with receiver(folder / "received") as url:
        places = [f"--run.dir={folder / 'run'}", f"--model.path={folder / 'model'}", f"--rollout.urls={url}"]
        sync = [f"--weight_sync.bucket_mb={bucket_mb}", "--weight_sync.transports=broadcast"]
        arguments = ["memory", str(result), "1", *places, *sync, *settings]
        run_ranks("benchmarks.weight_sync_worker", arguments, 2, folder)
    found = json.loads(result.read_text())
    assert found["largest_parameter"] < bucket_mb * 2**20 / 2, "the bound is not meant for those"
    return float(max(found["peak_bytes"]) / (bucket_mb * 2**20))


def test_gathering_over_tp_sending_and_hashing_take_two_buckets_at_most(tmp_path: Path) -> None:
    shape = LlamaConfig(**SHAPE, intermediate_size=704, num_hidden_layers=5, tie_word_embeddings=False)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")  # 110 MiB
    assert 0.5 < peak_buckets(tmp_path, 24, "--parallel.tensor=2") <= 2


def test_gathering_over_ep_keeps_no_expert_for_the_hash_of_all_of_them(tmp_path: Path) -> None:
    """A server has all experts of a layer, here of 2.75 buckets, in two parameters."""
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 704, "head_dim": 128}
    shape = Qwen3MoeConfig(**SHAPE, **experts, num_hidden_layers=2, tie_word_embeddings=False)
    Qwen3MoeForCausalLM(shape).save_pretrained(tmp_path / "model")  # 310 MiB
    assert 0.5 < peak_buckets(tmp_path, 48, "--parallel.data=2", "--parallel.expert=2") <= 2
