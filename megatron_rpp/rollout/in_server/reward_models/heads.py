"""Llama, Qwen2 and Qwen3 with a head that scores; only a server imports this."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.models import qwen2_classification, qwen3_classification
from sglang.srt.models.llama_reward import LlamaForSequenceClassification


class Qwen2ForSequenceClassification(qwen2_classification.Qwen2ForSequenceClassification):
    """Without the random bias of SGLang's head where the checkpoint has none, as transformers' never has."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        torch.nn.init.zeros_(self.score.bias)
        return super().load_weights(weights)


class Qwen3ForSequenceClassification(qwen3_classification.Qwen3ForSequenceClassification):
    """As Qwen2's."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        torch.nn.init.zeros_(self.score.bias)
        return super().load_weights(weights)


EntryClass = [LlamaForSequenceClassification, Qwen2ForSequenceClassification, Qwen3ForSequenceClassification]
