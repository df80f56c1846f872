"""Log-probs of the sampled tokens under policy and reference, before any update."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, partial

import torch
import torch.distributed as dist

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.fp8_scales import settle_scales
from megatron_rpp.engine.heads import LogitsHead, LogprobHead
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import gather_errors
from megatron_rpp.parallel.fused_logprobs import why_not_fused

logger = logging.getLogger(__name__)


def score(batch: ExperienceBatch, policy: Model, reference: Model | None, config: Config) -> ExperienceBatch:
    """`batch` with old_logprobs, entropy and, of a reference, ref_logprobs; each [B, S] float32, on every stage."""
    width = batch.tokens.shape[1]
    for model in (policy, reference) if reference is not None else (policy,):
        settle_scales(model, partial(_score_one, batch, config=config))
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
        fused=uses_fused_logprobs(config.train.fused_logprobs),
    )


@cache
def uses_fused_logprobs(setting: str) -> bool:
    """What train.fused_logprobs means in this job: the same on all ranks. ValueError on all where `on` cannot be.

    The first call with a setting compiles and runs the kernels, and is a collective over the job where there is one:
    it is to be made by all ranks when they start. Later ones repeat its answer.
    """
    if setting == "off" or (setting == "auto" and not device.has_cuda()):
        return False
    own = why_not_fused()
    missing = gather_errors(own) if dist.is_initialized() else own
    if missing and setting == "on":
        raise ValueError(f"train.fused_logprobs=on cannot be here: {missing}; or set it to off")
    if missing:
        logger.warning("log-probs are not fused (train.fused_logprobs=auto): %s", missing)
    return not missing


def _score_one(batch: ExperienceBatch, model: Model, config: Config) -> dict[str, torch.Tensor]:
    head = logprob_head(model, config, config.rollout.temperature)
    with torch.no_grad():
        return run_pipeline(model, batch, head, train=config.train, forward_only=True)
