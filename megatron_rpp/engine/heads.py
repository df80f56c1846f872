"""What the last pipeline stage computes from logits. The one place where logits and tokens are shifted.

Logits at position t predict token t + 1; everything returned is aligned with tokens (see experience.types).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.algorithm.loss import policy_loss
from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.config.schema import AlgorithmConfig
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parallel.collectives import gather_shards
from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs


class Head(Protocol):
    """logits [b, S, V / tp_size] and their microbatch -> (loss, named outputs). The loss may have no gradient."""

    def __call__(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class LogitsHead:
    """The logits [b, S, V] of every position, whole on every TP rank: for comparisons on small models."""

    vocab_size: int
    tp_group: ProcessGroup
    softcap: float | None = None  # the model's own, of its logits

    def __call__(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        whole = torch.cat(gather_shards(logits, self.tp_group), dim=-1)[..., : self.vocab_size]
        if self.softcap is not None:
            whole = self.softcap * torch.tanh(whole / self.softcap)
        return logits.new_zeros(()), {"logits": whole}


@dataclass(frozen=True)
class LogprobHead:
    """Log-probs and entropy of the response tokens; its loss is zero."""

    vocab_size: int
    temperature: float
    chunk_tokens: int
    tp_group: ProcessGroup | None
    softcap: float | None = None  # the model's own, of its logits

    def __call__(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = self.logprobs(logits, micro)
        return logits.new_zeros(()), {"logprobs": logprobs, "entropy": entropy}

    def logprobs(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), each [b, S] float32, 0 outside loss_mask."""
        rows, positions = torch.nonzero(micro.loss_mask[:, 1:], as_tuple=True)
        selected, entropies = vocab_parallel_logprobs(
            logits.flatten(0, 1),
            micro.tokens[rows, positions + 1],
            rows=rows * logits.shape[1] + positions,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            softcap=self.softcap,
            chunk_tokens=self.chunk_tokens,
            group=self.tp_group,
            overwrite_logits=True,  # Megatron's output layer does not keep them, and only heads read them
        )
        empty = torch.zeros_like(micro.loss_mask)
        at = (rows, positions + 1)
        return empty.index_put(at, selected), empty.index_put(at, entropies)


@dataclass(frozen=True)
class PolicyHead:
    """The policy loss of one microbatch, with its share of the optimizer step's counts."""

    logprob_head: LogprobHead
    algorithm: AlgorithmConfig
    global_token_count: float
    global_sequence_count: float

    def __call__(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert micro.old_logprobs is not None and micro.advantages is not None
        policy_logprobs, entropy = self.logprob_head.logprobs(logits, micro)
        return policy_loss(
            policy_logprobs,
            micro.old_logprobs,
            micro.advantages,
            micro.loss_mask,
            preset=self.algorithm,
            global_token_count=self.global_token_count,
            global_sequence_count=self.global_sequence_count,
            rollout_logprobs=micro.rollout_logprobs,
            ref_logprobs=micro.ref_logprobs,
            entropy=entropy,
        )


@dataclass(frozen=True)
class SftHead:
    """Negative log-likelihood of the response tokens, as a token mean over the whole step."""

    logprob_head: LogprobHead
    global_token_count: float

    def __call__(self, logits: Tensor, micro: ExperienceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, _ = self.logprob_head.logprobs(logits, micro)
        total = -masked_sum(logprobs, micro.loss_mask)
        return total / self.global_token_count, {"loss/total": total.detach().double()}
