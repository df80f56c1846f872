"""Megatron's own factors: what its schedule does to our loss, and to the 2-tuple that peers return."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.engine import loss_scale


class Settings:
    """What `forward_step_calc_loss` reads of a TransformerConfig."""

    calculate_per_token_loss = True
    timers = num_moe_experts = mtp_num_layers = grad_scale_func = None
    finalize_model_grads_func: Any = None


def scaled(loss_function: Any) -> float:
    """What Megatron makes of a loss of 3 with 8 microbatches and a context-parallel size of 2."""
    # Not at the top: the CPU device layer, which megatron_rpp.engine imports, must come before megatron.
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

    store: list[Any] = []
    out: tuple[Tensor, Any] = forward_step_calc_loss(
        torch.nn.Module(), torch.tensor(3.0), loss_function, Settings(), None, False, 8, store, 2, True
    )
    return out[0].item()


def test_megatron_leaves_our_loss_alone() -> None:
    assert scaled(lambda loss: loss_scale.as_megatron_loss(loss, {})) == 3.0


def test_megatron_would_scale_a_two_tuple_by_context_parallel_size_over_microbatches() -> None:
    """The trap that peers undo in several places. If this fails, Megatron has changed: read loss_scale.py again."""
    assert scaled(lambda loss: (loss * 1.0, {})) == 3.0 * 2 / 8


def test_gradients_are_not_divided_by_megatrons_token_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(loss_scale, "finalize_model_grads", lambda model, tokens, **kwargs: seen.append(tokens))
    settings: Any = Settings()
    loss_scale.use_plain_gradient_sum(settings)
    settings.finalize_model_grads_func([], torch.tensor(640))
    assert seen == [None]


def test_each_context_parallel_rank_gets_the_gradient_of_the_sum_by_its_own_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks compute the same loss: summed over them, or divided among them, the gradient would be off by their
    number. The other rank's part is 10 here."""
    monkeypatch.setattr(loss_scale.dist, "all_reduce", lambda x, group: x.add_(10))
    part = torch.tensor([1.0, 2.0], requires_grad=True)
    group: Any = SimpleNamespace(size=lambda: 2)
    total = loss_scale.sum_over_context(part, group)
    assert total.tolist() == [11, 12]
    (total**2).sum().backward()
    assert part.grad is not None and part.grad.tolist() == [22, 24]
    assert part.tolist() == [1, 2]
