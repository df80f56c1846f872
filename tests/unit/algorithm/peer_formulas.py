"""What each peer computes, in plain Python and plain torch, written from its published formulas.

Advantages are worked in exact fractions, so that they are also the truth for badly conditioned batches; a root
is taken of an exact variance. Nothing is imported from the package. The peers are those of August 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Row = list[Fraction]
Rows = list[Row]


@dataclass(frozen=True)
class Experience:
    """One batch. Log-probs outside the mask may be anything finite."""

    rewards: Row
    log_ratio: Rows  # log pi_old - log pi_ref
    mask: list[list[bool]]
    groups: list[int]
    greedy: Row
    beta: Fraction
    gamma: Fraction

    @property
    def rows(self) -> range:
        return range(len(self.rewards))

    def members(self, row: int) -> list[int]:
        return [other for other in self.rows if self.groups[other] == self.groups[row]]


# KL estimates.


def k1(x: Fraction) -> Fraction:
    return x


def k1_clamped(x: Fraction) -> Fraction:
    return min(max(x, Fraction(-10)), Fraction(10))


def k3_of_nemo_rl(x: Fraction) -> Fraction:
    clamped = float(min(max(x, Fraction(-20)), Fraction(20)))
    return Fraction(min(max(math.exp(-clamped) - 1 + clamped, -10.0), 10.0))


# Baselines.


def minus_inclusive_mean(e: Experience, scores: Row) -> Row:
    sums = [sum((scores[other] for other in e.members(b)), Fraction(0)) for b in e.rows]
    return [scores[b] - sums[b] / len(e.members(b)) for b in e.rows]


def minus_inclusive_mean_unless_alone(e: Experience, scores: Row) -> Row:
    centered = minus_inclusive_mean(e, scores)
    return [centered[b] if len(e.members(b)) > 1 else scores[b] for b in e.rows]


def clip_at_10(scores: Row) -> Row:
    return [min(max(score, Fraction(-10)), Fraction(10)) for score in scores]


# From scores to tokens.


def broadcast(e: Experience, scores: Row) -> Rows:
    return [[scores[b]] * len(e.mask[b]) for b in e.rows]


def token_rewards(e: Experience, scores: Row, kl: Callable[[Fraction], Fraction]) -> Rows:
    """-beta kl_t at each response token, plus the score at the last."""
    found = []
    for b in e.rows:
        inside = [t for t, m in enumerate(e.mask[b]) if m]
        found.append([-e.beta * kl(x) if m else Fraction(0) for x, m in zip(e.log_ratio[b], e.mask[b], strict=True)])
        if inside:
            found[b][inside[-1]] += scores[b]
    return found


def to_go_over_response_tokens(e: Experience, rewards: Rows, gamma: Fraction) -> Rows:
    """A masked token passes the running return on."""
    found = [[Fraction(0)] * len(row) for row in rewards]
    for b in e.rows:
        running = Fraction(0)
        for t in reversed(range(len(rewards[b]))):
            if e.mask[b][t]:
                running = rewards[b][t] + gamma * running
                found[b][t] = running
    return found


def to_go_over_every_token(e: Experience, rewards: Rows, gamma: Fraction) -> Rows:
    """gamma decays at a masked token too."""
    found = [[Fraction(0)] * len(row) for row in rewards]
    for b in e.rows:
        running = Fraction(0)
        for t in reversed(range(len(rewards[b]))):
            running = rewards[b][t] + gamma * running
            found[b][t] = running
    return found


def less_own_kl(e: Experience, scores: Row, kl: Callable[[Fraction], Fraction]) -> Rows:
    return [[scores[b] - e.beta * kl(x) for x in e.log_ratio[b]] for b in e.rows]


def scores_less_summed_kl(e: Experience, kl: Callable[[Fraction], Fraction]) -> Row:
    """R - beta sum_t kl_t."""
    sums = [sum((kl(x) for x, m in zip(e.log_ratio[b], e.mask[b], strict=True) if m), Fraction(0)) for b in e.rows]
    return [e.rewards[b] - e.beta * sums[b] for b in e.rows]


# Whitening over every response token of the batch.


def _masked(e: Experience, values: Rows) -> Row:
    return [x for b in e.rows for x, m in zip(values[b], e.mask[b], strict=True) if m]


def _scaled(e: Experience, values: Rows, mean: Fraction, root: float) -> list[list[float]]:
    return [[float(x - mean) / root if m else 0.0 for x, m in zip(values[b], e.mask[b], strict=True)] for b in e.rows]


def whiten_population_clamped(e: Experience, values: Rows) -> list[list[float]]:
    """ddof 0, rsqrt(var.clamp(1e-8)): the paper's authors, NeMo-RL."""
    inside = _masked(e, values)
    mean = sum(inside, Fraction(0)) / max(len(inside), 1)
    variance = sum(((x - mean) ** 2 for x in inside), Fraction(0)) / max(len(inside), 1)
    return _scaled(e, values, mean, math.sqrt(max(variance, Fraction(1e-8))))


def whiten_bessel_added(e: Experience, values: Rows) -> list[list[float]]:
    """Bessel's correction, rsqrt(var + 1e-8): verl. slime's E[x^2] - E[x]^2 is the same in exact arithmetic."""
    inside = _masked(e, values)
    mean = sum(inside, Fraction(0)) / max(len(inside), 1)
    variance = sum(((x - mean) ** 2 for x in inside), Fraction(0)) / max(len(inside) - 1, 1)
    return _scaled(e, values, mean, math.sqrt(variance + Fraction(1e-8)))


def whiten_one_pass(e: Experience, values: Rows) -> list[list[float]]:
    """slime: (E[x^2] - E[x]^2) n / (n - 1) + 1e-8 under the root."""
    inside, n = _masked(e, values), max(len(_masked(e, values)), 1)
    mean = sum(inside, Fraction(0)) / n
    variance = (sum((x * x for x in inside), Fraction(0)) / n - mean**2) * n / max(n - 1, 1)
    return _scaled(e, values, mean, math.sqrt(variance + Fraction(1e-8)))


def as_they_are(e: Experience, values: Rows) -> list[list[float]]:
    return _scaled(e, values, Fraction(0), 1.0)


# Advantages of each system.


def paper(e: Experience) -> list[list[float]]:
    """arXiv 2501.03262: k1 to go, then the global normalization; masked positions are skipped."""
    returns = to_go_over_response_tokens(e, token_rewards(e, e.rewards, k1_clamped), e.gamma)
    return whiten_population_clamped(e, returns)


def paper_baseline(e: Experience) -> list[list[float]]:
    """The same, version 9: minus the group mean, no KL in the reward."""
    return whiten_population_clamped(e, broadcast(e, minus_inclusive_mean(e, e.rewards)))


def openrlhf(e: Experience) -> list[list[float]]:
    returns = to_go_over_every_token(e, token_rewards(e, clip_at_10(e.rewards), k1_clamped), e.gamma)
    return whiten_population_clamped(e, returns)


def openrlhf_baseline(e: Experience) -> list[list[float]]:
    """gamma is set to 1."""
    scores = clip_at_10(minus_inclusive_mean(e, e.rewards))
    return whiten_population_clamped(e, to_go_over_every_token(e, token_rewards(e, scores, k1_clamped), Fraction(1)))


def verl(e: Experience) -> list[list[float]]:
    return whiten_bessel_added(e, to_go_over_response_tokens(e, token_rewards(e, e.rewards, k1), e.gamma))


def verl_baseline(e: Experience) -> list[list[float]]:
    return whiten_bessel_added(e, broadcast(e, minus_inclusive_mean_unless_alone(e, scores_less_summed_kl(e, k1))))


def slime(e: Experience) -> list[list[float]]:
    return whiten_one_pass(e, to_go_over_every_token(e, token_rewards(e, e.rewards, k1), e.gamma))


def slime_baseline(e: Experience) -> list[list[float]]:
    return whiten_one_pass(e, less_own_kl(e, minus_inclusive_mean(e, e.rewards), k1))


def nemo_rl(e: Experience) -> list[list[float]]:
    return whiten_population_clamped(e, less_own_kl(e, minus_inclusive_mean(e, e.rewards), k3_of_nemo_rl))


def grpo(e: Experience) -> list[list[float]]:
    """(R - mean) / (Bessel deviation + 1e-6)."""
    centered, scores = minus_inclusive_mean(e, e.rewards), []
    for b in e.rows:
        members = e.members(b)
        variance = sum(centered[other] ** 2 for other in members) / max(len(members) - 1, 1)
        scores.append(centered[b] / Fraction(math.sqrt(variance) + 1e-6))
    return as_they_are(e, broadcast(e, scores))


def dr_grpo(e: Experience) -> list[list[float]]:
    return as_they_are(e, broadcast(e, minus_inclusive_mean(e, e.rewards)))


def rloo(e: Experience) -> list[list[float]]:
    """arXiv 2402.14740: minus the mean of the others; undefined for one alone, which gets 0. The clamp is ours."""
    scores, found = scores_less_summed_kl(e, k1_clamped), list[Fraction]()
    for b in e.rows:
        others = [scores[other] for other in e.members(b) if other != b]
        found.append(scores[b] - sum(others, Fraction(0)) / len(others) if others else Fraction(0))
    return as_they_are(e, broadcast(e, found))


def remax(e: Experience) -> list[list[float]]:
    """arXiv 2310.10505: rewards to go, KL included, minus the greedy reward. The clamp is ours."""
    returns = to_go_over_response_tokens(e, token_rewards(e, e.rewards, k1_clamped), Fraction(1))
    return as_they_are(e, [[x - e.greedy[b] for x in returns[b]] for b in e.rows])


ADVANTAGES: dict[str, Callable[[Experience], list[list[float]]]] = {
    f.__name__: f
    for f in (
        paper,
        paper_baseline,
        openrlhf,
        openrlhf_baseline,
        verl,
        verl_baseline,
        slime,
        slime_baseline,
        nemo_rl,
        grpo,
        dr_grpo,
        rloo,
        remax,
    )
}


# Policy losses, differentiable in `new`.


def ppo_clip(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def ratio_clamped(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).clamp(-20, 20).exp()


def ratio_free(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).exp()


def token_mean(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses * mask).sum() / mask.sum()


def sequence_mean(losses: Tensor, mask: Tensor) -> Tensor:
    means = [(losses[b] * mask[b]).sum() / mask[b].sum() for b in range(len(mask)) if mask[b].sum() > 0]
    return torch.stack(means).mean()


@dataclass(frozen=True)
class LossInputs:
    """[B, S] each, float64; finite everywhere."""

    new: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor


def clipped_token_mean(x: LossInputs) -> Tensor:
    """The paper, OpenRLHF: log-ratio clamped at 20, clip 0.2, mean over tokens."""
    return token_mean(ppo_clip(ratio_clamped(x.new, x.old), x.advantages), x.mask)


def paper_baseline_loss(x: LossInputs) -> Tensor:
    """0.001 k2 beside it."""
    return clipped_token_mean(x) + 0.001 * token_mean((x.new - x.ref) ** 2 / 2, x.mask)


def verl_loss(x: LossInputs) -> Tensor:
    ratio = ratio_clamped(x.new, x.old)
    free, clipped = -x.advantages * ratio, -x.advantages * ratio.clamp(0.8, 1.2)
    ppo = torch.maximum(free, clipped)
    dual = torch.min(-x.advantages * 3.0, ppo)
    return token_mean(torch.where(x.advantages < 0, dual, ppo), x.mask)


def slime_loss(x: LossInputs) -> Tensor:
    return sequence_mean(ppo_clip(ratio_free(x.new, x.old), x.advantages), x.mask)


def nemo_rl_loss(x: LossInputs) -> Tensor:
    return token_mean(ppo_clip(ratio_free(x.new, x.old), x.advantages), x.mask)


def grpo_loss(x: LossInputs) -> Tensor:
    """arXiv 2402.03300: mean over responses of token means, with 0.04 k3 = exp(r) - r - 1, r = log ref - log pi."""
    r = x.ref - x.new
    return sequence_mean(ppo_clip(ratio_clamped(x.new, x.old), x.advantages) + 0.04 * (r.exp() - r - 1), x.mask)


DR_GRPO_CONSTANT = 17


def dr_grpo_loss(x: LossInputs) -> Tensor:
    """arXiv 2503.20783: token sums over a constant, mean over responses."""
    losses = ppo_clip(ratio_clamped(x.new, x.old), x.advantages)
    responses = sum(1 for b in range(len(x.mask)) if x.mask[b].sum() > 0)
    return (losses * x.mask).sum() / (DR_GRPO_CONSTANT * responses)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "paper": clipped_token_mean,
    "paper_baseline": paper_baseline_loss,
    "openrlhf": clipped_token_mean,
    "openrlhf_baseline": clipped_token_mean,
    "verl": verl_loss,
    "verl_baseline": verl_loss,
    "slime": slime_loss,
    "slime_baseline": slime_loss,
    "nemo_rl": nemo_rl_loss,
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "rloo": clipped_token_mean,
    "remax": clipped_token_mean,
}
