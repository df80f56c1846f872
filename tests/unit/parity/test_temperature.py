"""The temperature that explains the engine is found, also between the steps of the first grid."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_rpp.engine.heads import LogprobHead
from megatron_rpp.experience.packing import padded
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parity.evidence import TemperatureFit
from megatron_rpp.parity.gather import picked_rows
from megatron_rpp.parity.temperature import TemperaturesHead, errors, fit_temperature

ROWS, WIDTH, VOCAB = 4, 20, 11
TOKENS = float(ROWS * (WIDTH - 2))


def make_logits() -> Tensor:
    return 2 * torch.randn(ROWS, WIDTH, VOCAB, generator=torch.Generator().manual_seed(3))


def make_batch() -> ExperienceBatch:
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(ROWS, WIDTH)
    mask[:, :2] = 0
    tokens = torch.randint(VOCAB, (ROWS, WIDTH), generator=g)
    return ExperienceBatch(tokens, mask, torch.zeros(ROWS, WIDTH), torch.zeros(ROWS), torch.zeros(ROWS))


def sampled_at(engine_temperature: float) -> ExperienceBatch:
    """A batch whose engine reports log-probs at that temperature."""
    batch = make_batch()
    engine = LogprobHead(VOCAB, engine_temperature, 64, None).logprobs(make_logits(), padded(batch))[0]
    return ExperienceBatch(**{**batch.tensors(), "rollout_logprobs": engine})


def fitted(configured: float, batch: ExperienceBatch) -> TemperatureFit:
    def error_at(temperatures: Sequence[float]) -> list[float]:
        head = TemperaturesHead(tuple(LogprobHead(VOCAB, t, 64, None) for t in temperatures))
        outputs = head(make_logits(), padded(batch))[1]
        return [e / TOKENS for e in errors([outputs[str(i)] for i in range(len(temperatures))], batch)]

    return fit_temperature(configured, error_at)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 0.93, 1.6, 3.0])
def test_the_engines_temperature_is_found(temperature: float) -> None:
    fit = fitted(1.0, sampled_at(temperature))
    assert fit.explains
    assert fit.best == pytest.approx(temperature, rel=0.003)
    assert fit.best_error < 0.05 * fit.error


def test_temperature_one_is_always_tried_because_servers_may_report_it_whatever_they_sample_at() -> None:
    fit = fitted(0.15, sampled_at(1.0))
    assert fit.best == 1.0 and fit.best_error == 0.0


def test_the_configured_temperature_explains_nothing_where_it_is_right() -> None:
    fit = fitted(0.8, sampled_at(0.8))
    assert fit.best == 0.8 and fit.error == 0.0 and not fit.explains


def test_noise_is_no_temperature() -> None:
    batch = sampled_at(1.0)
    noise = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    assert not fitted(
        1.0, ExperienceBatch(**{**batch.tensors(), "rollout_logprobs": batch.rollout_logprobs + noise})
    ).explains


def test_a_replica_without_rows_takes_part_with_none() -> None:
    """`torch.tensor([])` is of floats, which index nothing."""
    batch = make_batch()
    none = picked_rows(batch, [])
    assert none.tokens.shape == (0, WIDTH) and picked_rows(none, []).tokens.shape == (0, WIDTH)
    assert errors([torch.zeros(0, WIDTH)] * 2, none) == [0.0, 0.0]
