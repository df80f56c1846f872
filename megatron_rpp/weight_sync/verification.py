"""The proof of a sync: every server's checksums against the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.in_server.delta_loader import FAILED
from megatron_rpp.weight_sync.checksum_report import differences, sampled_out
from megatron_rpp.weight_sync.checksums import Digests, ExpectedChecksums, merge
from megatron_rpp.weight_sync.phases import Phases, for_each_server
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure

_SHOWN = 5


class Verification:
    """Of one attempt. `add` sees every tensor of this rank's stage on its sender; then all ranks `run` it."""

    def __init__(self, hf: HFConfig, servers: Sequence[Server], version: int, config: WeightSyncConfig) -> None:
        self._servers = tuple(servers)
        self.skip = _skipped(hf, version, config)
        self._own = None if config.verify == "off" else _expected(hf, servers, self.skip)

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole tensor as it is sent."""
        if self._own is not None:
            self._own.add(name, tensor)

    def run(self, phases: Phases, *, is_leader: bool) -> None:
        """Compare. Raises WeightSyncError on every rank, with the tensors that differ.

        is_leader: whether this rank has seen its stage's tensors (ParallelContext.is_stage_leader).
        """
        if (own := self._own) is None:
            return
        deadline = phases.deadline("verify")
        stages = phases.run(deadline, (lambda _: own.result()) if is_leader else None)
        expected = merge(stage for stage in stages if stage is not None)
        check = partial(_check, expected, self.skip)
        each = partial(for_each_server, self._servers, check)
        phases.run(deadline, each if dist.get_rank() == 0 else None)


def _check(expected: Digests, skip: Sequence[str], server: Server, deadline: Deadline) -> None:
    """Raises ServerFailure naming the tensors of `server` that are not as expected."""
    reported = control.checksums(server.url, skip, deadline.left_s())
    if found := differences(expected[server.tp_size], reported, skip):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ServerFailure(server.url, f"{'; '.join(found[:_SHOWN])}{more}", tensors=found)


def _expected(hf: HFConfig, servers: Sequence[Server], skip: Sequence[str]) -> ExpectedChecksums:
    devices = {server.device for server in servers}
    if len(devices) > 1:
        raise ValueError(f"servers on {' and '.join(sorted(devices))} hash differently; set weight_sync.verify=off")
    return ExpectedChecksums(hf, {server.tp_size for server in servers}, device=devices.pop(), skip=skip)


def _skipped(hf: HFConfig, version: int, config: WeightSyncConfig) -> tuple[str, ...]:
    """Parts of the names of server tensors that a sync to `version` does not compare.

    A note that our loader has left in an attempt that was given up is no tensor of the model.
    """
    sampled = sampled_out(hf.num_layers, version) if config.verify == "sample" else ()
    return (*config.unverified, *sampled, FAILED)
