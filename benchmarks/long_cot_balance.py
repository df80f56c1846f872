"""How evenly the recorded lengths are dealt to replicas, by the predicted cost of a 7B model; nothing is trained."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.long_cot_lengths import Lengths
from megatron_rpp.engine.balance import Size, deal_out
from megatron_rpp.experience.balance import SequenceCost
from megatron_rpp.model.cost import sequence_cost
from megatron_rpp.model.hf_mapping import read_hf_config

REPLICAS, PROMPTS, SAMPLES, BATCH_SIZE = 8, 256, 4, 128  # the last three are the paper's
QWEN_7B: dict[str, Any] = {  # Qwen2.5-7B
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def dp_imbalance(lengths: Lengths, steps: int) -> dict[str, float]:
    """Predicted cost of the largest replica over the mean, less 1: mean over optimizer steps, dealt and as sampled."""
    cost, rng = cost_of_7b(), random.Random(0)
    batches = [lengths.draw(rng, PROMPTS, SAMPLES) for _ in range(steps)]
    found = {}
    for name, may_move in (("dp_imbalance", True), ("dp_imbalance_as_sampled", False)):
        each = [
            deal_out(sizes_of(drawn, lengths.prompt_tokens), BATCH_SIZE, cost, may_move=may_move).imbalance
            for drawn in batches
        ]
        found[name], found[f"{name}_worst"] = statistics.fmean(each), max(each)
    return found


def sizes_of(drawn: list[list[int]], prompt_tokens: int) -> list[list[Size]]:
    """What each replica has sampled: prompt i is replica i mod REPLICAS's."""
    return [
        [
            Size(group, prompt_tokens + tokens)
            for group in range(replica, len(drawn), REPLICAS)
            for tokens in drawn[group]
        ]
        for replica in range(REPLICAS)
    ]


def cost_of_7b() -> SequenceCost:
    """Forward operations of Qwen2.5-7B."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
        return sequence_cost(read_hf_config(folder))
