"""What flows through the loop: Prompt -> Rollout -> ExperienceBatch.

Every [B, S] tensor is aligned with `tokens`: position t holds what belongs to token t, so
`old_logprobs[b, t]` is log p(tokens[b, t] | tokens[b, :t]); position 0 is always 0.

    tokens     [ P  P  P  r  r  e  . ]     P prompt, r response, e end token, . padding
    loss_mask  [ 0  0  0  1  1  1  0 ]
    logprobs   [ 0  .  .  x  x  x  . ]     only x is ever used
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rpp.experience.chat import Chat


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenized."""

    id: int  # unique in the run's training prompts, or in its evaluation set
    text: str
    token_ids: tuple[int, ...]
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)  # what a verifier may want
    source: str = ""  # its name in data.sources or data.evals; empty for data.train
    pass_rate: float | None = None  # how often it is solved, from 0 to 1, where its source says so
    turns: tuple[dict[str, Any], ...] = ()  # of a conversation; empty: `text` is what is asked
    opens_thought: bool = False  # its tokens end with <think>, as some chat templates do: responses go on from there

    @property
    def asked(self) -> Chat:
        """What the tokenizer was given: the text, or a conversation."""
        return self.turns or self.text


UNSYNCED = -1
"""The policy version of weights that no sync has named."""


class VersionSpan(NamedTuple):
    """Response tokens [start, end) were sampled by the weights of `version`, which may be UNSYNCED."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `response_ids` ends with the stop token when finish_reason is "stop"."""

    prompt: Prompt
    group_id: int  # position of the prompt in the global batch; all its samples share it
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]  # the engine's, one a response token
    text: str  # the response, decoded, without special tokens
    finish_reason: str  # stop | length
    version_spans: tuple[VersionSpan, ...]  # which weights sampled it, in the order of its tokens
    engine_prompt_ids: tuple[int, ...] | None = None  # that the engine says it sampled behind; None: it does not say

    def __post_init__(self) -> None:
        assert len(self.rollout_logprobs) == len(self.response_ids), "one log-prob a response token"
        assert self.version_spans, "a response was sampled by some version"

    @property
    def policy_version(self) -> int:
        """The newest version of the policy that sampled any of it."""
        return max(span.version for span in self.version_spans)

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason != "stop"


@dataclass(frozen=True)
class ExperienceBatch:
    """One replica's rollouts as tensors; scoring and advantages add the optional ones."""

    tokens: Tensor  # [B, S] int64, padded on the right
    loss_mask: Tensor  # [B, S] float32, 1 on trained response tokens
    rollout_logprobs: Tensor  # [B, S] float32, 0 where loss_mask is 0
    rewards: Tensor  # [B] float64
    group_ids: Tensor  # [B] int64, position of the prompt in the global batch
    minibatch_ids: Tensor | None = None  # [B] int64, the optimizer step, of this rollout batch, that trains the row
    greedy_rewards: Tensor | None = None  # [B] float64, of the greedy response to the prompt (ReMax)
    old_logprobs: Tensor | None = None  # [B, S] float32
    ref_logprobs: Tensor | None = None  # [B, S] float32
    entropy: Tensor | None = None  # [B, S] float32, of the policy's distribution at each token
    advantages: Tensor | None = None  # [B, S] float32, 0 where loss_mask is 0

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def rows(self, index: Tensor) -> ExperienceBatch:
        """The sequences at `index` [N]."""
        picked = {k: v[index] for k, v in self.tensors().items()}
        return ExperienceBatch(**picked)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
