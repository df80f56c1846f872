"""What the last pipeline stage computes from logits. The one place where logits and tokens are shifted.

Logits at position t predict token t + 1; everything returned is aligned with tokens (see experience.types).
Whether the logits are of padded rows or of packed sequences, and on which context-parallel rank, is told by
`Microbatch.logits_at`; what heads return is [b, S] and the same on every rank.
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
from megatron_rpp.engine.loss_scale import sum_over_context
from megatron_rpp.experience.packing import Microbatch
from megatron_rpp.parallel.collectives import gather_shards
from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs

REAL_POSITIONS, ALL_POSITIONS = "positions/real", "positions/all"
"""Of a policy step's sums: positions with a token, and those that the model ran over."""


class Head(Protocol):
    """logits [b, S, V / tp_size], packed [1, T / cp_size, V / tp_size], and their microbatch -> (loss, named outputs).

    The loss may have no gradient. Outputs [b, S, ...] belong to the microbatch's rows; scalars are summed.
    """

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class LogitsHead:
    """The logits [b, S, V] of every position that the model ran over, 0 elsewhere, whole on every rank: for
    comparisons on small models."""

    vocab_size: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup
    softcap: float | None = None  # the model's own, of its logits

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        whole = torch.cat(gather_shards(logits, self.tp_group), dim=-1)[..., : self.vocab_size]
        if self.softcap is not None:
            whole = self.softcap * torch.tanh(whole / self.softcap)
        here = whole.flatten(0, 1)[micro.logits_at.clamp(min=0)] * (micro.logits_at >= 0)[..., None]
        return logits.new_zeros(()), {"logits": sum_over_context(here, self.cp_group)}


@dataclass(frozen=True)
class LogprobHead:
    """Log-probs and entropy of the response tokens; its loss is zero."""

    vocab_size: int
    temperature: float
    chunk_tokens: int
    tp_group: ProcessGroup | None
    softcap: float | None = None  # the model's own, of its logits
    cp_group: ProcessGroup | None = None
    fused: bool = False  # compiled kernels, which need no chunks

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = self.logprobs(logits, micro)
        return logits.new_zeros(()), {"logprobs": logprobs, "entropy": entropy}

    def logprobs(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), each [b, S] float32, 0 outside loss_mask."""
        mask, tokens = micro.rows.loss_mask, micro.rows.tokens
        predicts = (mask[:, 1:] != 0) & (micro.logits_at[:, :-1] >= 0)  # and its logits are here
        rows, positions = torch.nonzero(predicts, as_tuple=True)
        selected, entropies = vocab_parallel_logprobs(
            logits.flatten(0, 1),
            tokens[rows, positions + 1],
            rows=micro.logits_at[rows, positions],
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            softcap=self.softcap,
            chunk_tokens=self.chunk_tokens,
            group=self.tp_group,
            fused=self.fused,
            overwrite_logits=True,  # Megatron's output layer does not keep them, and only heads read them
        )
        empty = torch.zeros_like(mask)
        at = (rows, positions + 1)
        # Apart, so that a loss without entropy does not pay for its gradient.
        found = empty.index_put(at, selected), empty.index_put(at, entropies)
        return sum_over_context(found[0], self.cp_group), sum_over_context(found[1], self.cp_group)


@dataclass(frozen=True)
class PolicyHead:
    """The policy loss of one microbatch, with its share of the optimizer step's counts."""

    logprob_head: LogprobHead
    algorithm: AlgorithmConfig
    global_token_count: float
    global_sequence_count: float

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = micro.rows
        assert rows.old_logprobs is not None and rows.advantages is not None
        policy_logprobs, entropy = self.logprob_head.logprobs(logits, micro)
        loss, sums = policy_loss(
            policy_logprobs,
            rows.old_logprobs,
            rows.advantages,
            rows.loss_mask,
            preset=self.algorithm,
            global_token_count=self.global_token_count,
            global_sequence_count=self.global_sequence_count,
            rollout_logprobs=rows.rollout_logprobs,
            ref_logprobs=rows.ref_logprobs,
            entropy=entropy,
        )
        positions = {REAL_POSITIONS: micro.real_positions, ALL_POSITIONS: micro.positions}
        return loss, sums | {name: loss.new_tensor(float(count)).detach() for name, count in positions.items()}


@dataclass(frozen=True)
class SftHead:
    """Negative log-likelihood of the response tokens, as a token mean over the whole step."""

    logprob_head: LogprobHead
    global_token_count: float

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, _ = self.logprob_head.logprobs(logits, micro)
        total = -masked_sum(logprobs, micro.rows.loss_mask)
        return total / self.global_token_count, {"loss/total": total.detach().double()}
