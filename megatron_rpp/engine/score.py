"""Log-probs of the sampled tokens under policy and reference, before any update."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.heads import LogitsHead, LogprobHead
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model


def score(batch: ExperienceBatch, policy: Model, reference: Model | None, config: Config) -> ExperienceBatch:
    """`batch` with old_logprobs, entropy and, of a reference, ref_logprobs; each [B, S] float32, on every stage."""
    width = batch.tokens.shape[1]
    of_policy = _score_one(batch, policy, config)
    of_reference = _score_one(batch, reference, config)["logprobs"][:, :width] if reference is not None else None
    return replace(
        batch,
        old_logprobs=of_policy["logprobs"][:, :width],
        entropy=of_policy["entropy"][:, :width],
        ref_logprobs=of_reference,
    )


def logits_head(model: Model) -> LogitsHead:
    """Whole logits of `model`, as its authors define them."""
    return LogitsHead(
        model.hf.vocab_size, model.parallel.tp_group, model.parallel.cp_group, softcap=model.hf.logits_softcap
    )


def logprob_head(model: Model, config: Config, temperature: float) -> LogprobHead:
    """The log-prob head of `model`, over its TP and CP groups."""
    return LogprobHead(
        vocab_size=model.hf.vocab_size,
        temperature=temperature,
        chunk_tokens=config.train.logprob_chunk_tokens,
        tp_group=model.parallel.tp_group if model.parallel.tp_size > 1 else None,
        softcap=model.hf.logits_softcap,
        cp_group=model.parallel.cp_group if model.parallel.cp_size > 1 else None,
    )


def _score_one(batch: ExperienceBatch, model: Model, config: Config) -> dict[str, torch.Tensor]:
    head = logprob_head(model, config, config.rollout.temperature)
    with torch.no_grad():
        return run_pipeline(model, batch, head, train=config.train, forward_only=True)
