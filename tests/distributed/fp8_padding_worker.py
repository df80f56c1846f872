"""One rank: the fixed batch with and without the padding that FP8's products want; the ranks compare for themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.engine import microbatches
from megatron_rpp.engine.heads import ALL_POSITIONS
from megatron_rpp.engine.microbatches import cut_batch
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import build_model
from megatron_rpp.parallel import bootstrap
from tests.distributed.invariance_worker import force_full_gradients, own_rows, train_once
from tests.distributed.layouts import PACKED_TOKENS, worker_config

MULTIPLE = 16


def main() -> None:
    _, arguments = worker_config("")
    parallel = None
    for path in arguments["models"]:
        config, _ = worker_config(path)
        parallel = parallel or bootstrap.initialize(config.parallel, seed=0)
        policy, _ = make_trainable(build_model(config, parallel, path=path), config.optimizer, 1)
        force_full_gradients(policy)
        batch = own_rows(parallel)
        for tokens in arguments["micro_batch_tokens"]:
            case = replace(config, train=replace(config.train, micro_batch_tokens=tokens and PACKED_TOKENS))
            plain = _run(case, parallel, policy, batch, 1)
            aligned = _run(case, parallel, policy, batch, MULTIPLE)
            _compare(plain, aligned)
    bootstrap.shutdown()


def _run(
    config: Any, parallel: Any, policy: Any, batch: ExperienceBatch, multiple: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(sums, gradients) where every rank's tokens are a multiple of `multiple`."""
    microbatches.token_multiple_of = lambda transformer: multiple
    ranks = parallel.tp_size if policy.config.sequence_parallel else 1
    for micro in cut_batch(policy, batch, config.train):
        assert micro.tokens.numel() % (ranks * multiple) == 0
    result, gradients = train_once(config, parallel, policy, batch)
    return {**result["sums"], **result["positions"]}, gradients


def _compare(
    plain: tuple[dict[str, Tensor], dict[str, Tensor]], aligned: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    assert aligned[0].pop(ALL_POSITIONS) > plain[0].pop(ALL_POSITIONS), "nothing was padded"
    for name, value in plain[0].items():
        torch.testing.assert_close(aligned[0][name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert plain[1] and plain[1].keys() == aligned[1].keys()
    for name, gradient in plain[1].items():
        error = float((aligned[1][name] - gradient).norm() / gradient.norm())
        assert error < 1e-5, f"{name}: gradient differs by {error:.2e}"


if __name__ == "__main__":
    main()
