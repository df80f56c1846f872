"""What the heads make of logits: the shift by one token, the mask, the one denominator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm import policy_loss
from megatron_rpp.config.schema import AlgorithmConfig
from megatron_rpp.engine.heads import ALL_POSITIONS, REAL_POSITIONS, LogitsHead, LogprobHead, PolicyHead, SftHead
from megatron_rpp.experience.packing import PackingRule, pack, padded
from megatron_rpp.experience.types import ExperienceBatch

ROWS, WIDTH, VOCAB, PADDED = 3, 6, 7, 8
HEAD = LogprobHead(vocab_size=VOCAB, temperature=0.8, chunk_tokens=4, tp_group=None)


def make_batch(**changes: Any) -> ExperienceBatch:
    g = torch.Generator().manual_seed(4)
    mask = torch.zeros(ROWS, WIDTH)
    mask[0, 2:5] = mask[1, 1:] = 1  # row 2 has no response
    tensors = {
        "tokens": torch.randint(VOCAB, (ROWS, WIDTH), generator=g),
        "loss_mask": mask,
        "rollout_logprobs": torch.zeros(ROWS, WIDTH),
        "rewards": torch.zeros(ROWS),
        "group_ids": torch.zeros(ROWS, dtype=torch.int64),
        "old_logprobs": torch.randn(ROWS, WIDTH, generator=g) * 0.1 - 2,
        "advantages": torch.randn(ROWS, WIDTH, generator=g) * mask,
    }
    return ExperienceBatch(**{**tensors, **changes})


def make_logits() -> Tensor:
    return torch.randn(ROWS, WIDTH, PADDED, generator=torch.Generator().manual_seed(6)).requires_grad_()


def expected_logprobs(logits: Tensor, batch: ExperienceBatch) -> Tensor:
    """Log-prob of token t from the logits at t - 1, 0 outside the mask, in float64."""
    distribution = (logits[..., :VOCAB].double() / 0.8).log_softmax(-1)
    at_token = distribution[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(at_token, (1, 0)) * batch.loss_mask


def test_logprob_of_a_token_comes_from_the_logits_before_it() -> None:
    logits, batch = make_logits(), make_batch()
    loss, outputs = HEAD(logits, padded(batch))
    torch.testing.assert_close(outputs["logprobs"].double(), expected_logprobs(logits, batch), rtol=0, atol=2e-6)
    assert loss.item() == 0.0


def test_entropy_is_of_the_distribution_that_the_token_was_drawn_from() -> None:
    logits, batch = make_logits(), make_batch()
    distribution = torch.distributions.Categorical(logits=logits[..., :VOCAB].double() / 0.8)
    expected = torch.nn.functional.pad(distribution.entropy()[:, :-1], (1, 0)) * batch.loss_mask
    torch.testing.assert_close(HEAD(logits, padded(batch))[1]["entropy"].double(), expected.detach(), rtol=0, atol=2e-6)


def test_only_logits_before_a_response_token_get_a_gradient() -> None:
    logits, batch = make_logits(), make_batch()
    SftHead(HEAD, 1.0)(logits, padded(batch))[0].backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    expected = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    expected[0, 1:4] = expected[1, 0:5] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("head", [PolicyHead(HEAD, AlgorithmConfig(), 1.0, 1.0), SftHead(HEAD, 1.0)])
def test_a_microbatch_without_response_tokens_gives_zero_loss_and_zero_gradient(head: Any) -> None:
    """The pipeline still calls backward on it; a loss without a graph would raise there."""
    logits = make_logits()
    loss, outputs = head(logits, padded(make_batch(loss_mask=torch.zeros(ROWS, WIDTH))))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and (logits.grad == 0).all()
    assert all(value.item() == 0.0 for name, value in outputs.items() if name != ALL_POSITIONS)


def test_policy_head_uses_each_setting_of_the_algorithm_and_the_global_count() -> None:
    logits, batch = make_logits(), make_batch()
    algorithm = AlgorithmConfig(clip_eps_low=0.1, clip_eps_high=0.3, log_ratio_clamp=0.5)
    loss, sums = PolicyHead(HEAD, algorithm, 40.0, 5.0)(logits, padded(batch))
    assert batch.old_logprobs is not None and batch.advantages is not None
    ratio = (expected_logprobs(logits, batch) - batch.old_logprobs).clamp(-0.5, 0.5).exp()
    clipped = ratio.clamp(0.9, 1.3) * batch.advantages
    total = -(torch.minimum(ratio * batch.advantages, clipped) * batch.loss_mask).sum().item()
    assert loss.item() == pytest.approx(total / 40, rel=1e-5)
    assert sums["loss/policy"].item() == pytest.approx(total, rel=1e-5)


def test_policy_head_gives_the_loss_reference_sampler_entropy_and_sequence_count() -> None:
    """Each of these would be left out in silence if the head did not pass it on."""
    g = torch.Generator().manual_seed(8)
    logits = make_logits()
    near = torch.randn(ROWS, WIDTH, generator=g) * 0.3 - 2
    batch = make_batch(ref_logprobs=near, rollout_logprobs=near + 0.1)
    settings = {
        "kl_loss_coef": 0.3, "entropy_coef": 0.2, "importance_correction": "truncated", "importance_high": 1.1,
        "loss_aggregation": "sequence_mean",
    }  # fmt: skip
    loss, sums = PolicyHead(HEAD, AlgorithmConfig(**settings), 40.0, 5.0)(logits, padded(batch))
    logprobs, entropy = HEAD.logprobs(logits, padded(batch))
    assert batch.old_logprobs is not None and batch.advantages is not None
    expected = policy_loss(
        logprobs, batch.old_logprobs, batch.advantages, batch.loss_mask, global_token_count=40, global_sequence_count=5,
        rollout_logprobs=near + 0.1, ref_logprobs=near, entropy=entropy, **settings,
    )  # fmt: skip
    assert loss.item() == expected.loss.item()
    assert (
        sums.keys() - {REAL_POSITIONS, ALL_POSITIONS}
        == expected.sums.keys()
        >= {"loss/kl", "loss/entropy", "importance/weight_mean"}
    )


def test_sft_loss_is_the_negative_log_likelihood_over_the_global_count() -> None:
    logits, batch = make_logits(), make_batch()
    loss, sums = SftHead(HEAD, 16.0)(logits, padded(batch))
    total = -expected_logprobs(logits, batch).sum().item()
    assert loss.item() == pytest.approx(total / 16, rel=1e-6)
    assert sums["loss/total"].item() == pytest.approx(total, rel=1e-6)


def packed_logits(logits: Tensor, rows: list[int], rule: PackingRule) -> Tensor:
    """What this CP rank would have of `logits` [ROWS, WIDTH, V] if rows 0 and 1 were packed: [1, T / cp_size, V]."""
    micro = pack(make_batch(), rows, rule)
    found = torch.full((1, micro.tokens.shape[1], PADDED), 99.0)  # padding's are wild
    here = micro.logits_at >= 0
    return found.index_put((torch.zeros(int(here.sum()), dtype=torch.int64), micro.logits_at[here]), logits[rows][here])


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_the_parts_of_packed_context_parallel_logprobs_add_up_to_the_padded_ones(cp_size: int) -> None:
    """A token's logits may lie on another CP rank than the token."""
    logits, batch, rows = make_logits(), make_batch(), [1, 0]
    expected_parts = HEAD.logprobs(logits, padded(batch))
    parts: list[Tensor] = []
    for rank in range(cp_size):
        rule = PackingRule(64, cp_size, rank)
        found = HEAD.logprobs(packed_logits(logits, rows, rule), pack(batch, rows, rule))
        parts.append(torch.stack(found))
        if cp_size > 1:
            assert (parts[-1][0] == 0).any() and not torch.equal(parts[-1][0], expected_parts[0][rows])
    total = torch.stack(parts).sum(0)
    torch.testing.assert_close(total, torch.stack(expected_parts)[:, rows], rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (total, torch.stack(expected_parts)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_logits_of_packed_rows_stand_where_their_tokens_do() -> None:
    group: Any = SimpleNamespace(size=lambda: 1)
    logits, rule = make_logits().detach(), PackingRule(64)
    found = LogitsHead(PADDED, group, group)(packed_logits(logits, [1, 0], rule), pack(make_batch(), [1, 0], rule))[1]
    expected = logits[[1, 0]]
    expected[1, 5] = 0  # row 0 ends at 5
    assert torch.equal(found["logits"], expected)


def test_policy_head_counts_the_positions_that_the_model_ran_over() -> None:
    """Rows of 5, 6 and no tokens: 11 of 18 positions, or of 16 where two slots are multiples of 4."""
    head, batch = PolicyHead(HEAD, AlgorithmConfig(), 1.0, 1.0), make_batch()
    of_rows = head(make_logits(), padded(batch))[1]
    rule = PackingRule(64, 2, 0)
    of_slots = head(packed_logits(make_logits(), [0, 1], rule), pack(batch, [0, 1], rule))[1]
    for found, run in ((of_rows, 18), (of_slots, 16)):
        assert (found[REAL_POSITIONS].item(), found[ALL_POSITIONS].item()) == (11, run)
