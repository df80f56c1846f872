"""One rank of several layouts in turn: what real training allocates, measured, for comparison with `rpp plan`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.heads import PolicyHead
from megatron_rpp.engine.optimizer import Optimizer, chained_parts, make_trainable
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.engine.train_step import global_counts, optimizer_step
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.support.layouts_in_turn import take_layout


class LiveSaved:
    """Bytes of the storages that autograd keeps, a storage once, as long as it keeps them; and their peak."""

    def __init__(self, parameters: set[int]) -> None:
        self._held: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._parameters = parameters
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)

    def take(self, storage: Any) -> None:
        key = storage.data_ptr()
        if key in self._parameters:
            return
        if not self._held[key]:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._held[key] += 1

    def drop(self, storage: Any) -> None:
        key = storage.data_ptr()
        if key in self._parameters:
            return
        self._held[key] -= 1
        if not self._held[key]:
            self.now -= self._sizes[key]


class _Held:
    """A saved tensor; autograd lets go of it in the backward."""

    def __init__(self, tensor: Tensor, live: LiveSaved) -> None:
        self.tensor, self._live = tensor, live
        live.take(tensor.untyped_storage())

    def __del__(self) -> None:
        self._live.drop(self.tensor.untyped_storage())


def measure(config: Config, parallel: ParallelContext) -> dict[str, int]:
    """Bytes on this rank, after one optimizer step on full-length responses."""
    policy, optimizer = make_trainable(
        build_model(config, parallel, path=config.model.path), config.optimizer, total_steps=1
    )
    rows, length = config.train.batch_size // parallel.dp_size, config.rollout.context_length
    generator = torch.Generator().manual_seed(parallel.dp_rank)
    shape, mask = (rows, length), torch.ones(rows, length)
    mask[:, 0] = 0
    batch = ExperienceBatch(
        tokens=torch.randint(policy.hf.vocab_size, shape, generator=generator),
        loss_mask=mask,
        rollout_logprobs=-mask,
        rewards=torch.zeros(rows, dtype=torch.float64),
        greedy_rewards=None,
        group_ids=torch.arange(rows),
        old_logprobs=-mask,
        advantages=torch.randn(shape, generator=generator) * mask,
    )
    live = LiveSaved({parameter.untyped_storage().data_ptr() for parameter in _parameters(policy)})
    head = PolicyHead(logprob_head(policy, config, 1.0), config.algorithm, *global_counts(batch, policy))
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        optimizer_step(policy, optimizer, batch, head, config.train)
    assert live.now == 0, "the backward has let go of everything"
    return {
        "stage": parallel.pp_rank,
        "parameters": sum(parameter.numel() for parameter in _parameters(policy)),
        "parameter_bytes": _bytes(parameter for parameter in _parameters(policy)),
        "gradient_bytes": _bytes(parameter.main_grad for parameter in _parameters(policy)),  # type: ignore[attr-defined]
        "optimizer_bytes": _optimizer_bytes(policy, optimizer),
        "saved_bytes": live.peak,
    }


def _parameters(model: Model) -> list[torch.nn.Parameter]:
    return [parameter for chunk in model.chunks for parameter in chunk.parameters()]


def _bytes(tensors: Any) -> int:
    """Of the storages of `tensors`, each once: parameters and gradients are views of Megatron's buffers."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _optimizer_bytes(policy: Model, optimizer: Optimizer) -> int:
    """Main parameters, where they are no views of the model's own, and everything in Adam's state."""
    parts = chained_parts(optimizer.megatron)
    adams = [part.optimizer for part in parts]
    own = {parameter.untyped_storage().data_ptr() for parameter in _parameters(policy)}
    main = [p for adam in adams for group in adam.param_groups for p in group["params"]]
    copies = [p for p in main if p.untyped_storage().data_ptr() not in own]
    state = [x for adam in adams for of_one in adam.state.values() for x in of_one.values() if torch.is_tensor(x)]
    return _bytes([*copies, *state])


def main() -> None:
    jobs: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    out, first = Path(sys.argv[2]), None
    for name, settings in jobs.items():
        config = build({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        parallel = take_layout(name, config.parallel, first)
        first = first or parallel
        (out / f"{name}-{parallel.rank}.json").write_text(json.dumps(measure(config, parallel)))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
