"""The proof of a sync: every server's checksums against the trainer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8_params import is_fp8
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.model.stage_export import NamedTensor
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.in_server.delta_loader import FAILED
from megatron_rpp.weight_sync.checksum_report import differences, sampled_out
from megatron_rpp.weight_sync.checksums import Digests, ExpectedChecksums, merge
from megatron_rpp.weight_sync.phases import Phases, for_each_server
from megatron_rpp.weight_sync.server_checks import why_unverifiable
from megatron_rpp.weight_sync.threads import in_thread
from megatron_rpp.weight_sync.transport import Deadline, Failure, ServerFailure, WeightSyncError

_SHOWN = 5


class Verification:
    """Of one attempt. `add` sees every tensor of this rank's stage on its sender; then all ranks `run` it.

    What is sent as the model holds it is hashed in `run`, while the servers hash what they hold; only what was made
    to be sent is hashed as it comes, since it goes again.
    """

    def __init__(
        self,
        policy: Model,
        servers: Sequence[Server],
        version: int,
        dtype: torch.dtype | None,
        config: WeightSyncConfig,
    ) -> None:
        """policy: does not change until `run` has ended. dtype: of what is sent, as StageExport's.

        Raises WeightSyncError, on all ranks alike, with the servers that cannot be verified.
        """
        assert servers, "nobody to verify"
        self._servers = tuple(servers)
        self.skip = _skipped(policy.hf, version, config)
        parameters = [item.parameter for item in sharded_parameters(policy.chunks)]
        self._held = {_memory_of(each) for each in parameters if not is_fp8(each)}
        self._later: list[NamedTensor] = []  # views of the model's parameters
        self._own: dict[str, ExpectedChecksums] | None = None  # by device, as they hash differently; None: verify=off
        if config.verify != "off":
            _refuse(servers, dtype, config.unverified)
            self._own = _expected(policy.hf, servers, self.skip)

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole tensor as it is sent."""
        if self._own is None:
            return
        if _memory_of(tensor) in self._held:
            self._later.append((name, tensor))
        else:
            _add(self._own, name, tensor)

    def run(self, phases: Phases, *, is_leader: bool) -> None:
        """Compare. Raises WeightSyncError on every rank, with the tensors that differ.

        is_leader: whether this rank has seen its stage's tensors (ParallelContext.is_stage_leader).
        """
        if self._own is None:
            return
        deadline, asked = phases.deadline("verify"), dist.get_rank() == 0
        ask = lambda server: in_thread(control.checksums, server.url, self.skip, deadline.left_s())  # noqa: E731
        replies = {server.url: ask(server) for server in self._servers if asked}
        own = self._own
        stages = phases.run(deadline, (lambda _: self._results(own)) if is_leader else None)
        told = [stage for stage in stages if stage is not None]
        expected = {each: merge(stage[each] for stage in told) for each in own}
        check = partial(_check, expected, self.skip, replies)
        each = partial(for_each_server, self._servers, check)
        phases.run(deadline, each if asked else None)

    def _results(self, own: Mapping[str, ExpectedChecksums]) -> dict[str, Digests]:
        for name, tensor in self._later:
            _add(own, name, tensor)
        return {each: checksums.result() for each, checksums in own.items()}


def _memory_of(tensor: Tensor) -> int:
    """The same number for tensors that share their memory. An FP8 tensor has none that can be named."""
    return tensor.untyped_storage().data_ptr()


def _add(own: Mapping[str, ExpectedChecksums], name: str, tensor: Tensor) -> None:
    for checksums in own.values():
        checksums.add(name, tensor)


def _check(
    expected: Mapping[str, Digests],
    skip: Sequence[str],
    replies: Mapping[str, Future[list[dict[str, Any]]]],
    server: Server,
    deadline: Deadline,
) -> None:
    """Raises ServerFailure naming the tensors of `server` that are not as expected."""
    reported = replies[server.url].result()
    if found := differences(expected[server.device][server.tp_size], reported, skip):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ServerFailure(server.url, f"{'; '.join(found[:_SHOWN])}{more}", tensors=found)


def _refuse(servers: Sequence[Server], dtype: torch.dtype | None, unverified: Sequence[str]) -> None:
    reasons = [(server.url, why_unverifiable(server, dtype, unverified)) for server in servers]
    failures = [Failure("begin", 0, reason, url) for url, reason in reasons if reason is not None]
    if failures:
        raise WeightSyncError("; ".join(map(str, failures)), failures)


def _expected(hf: HFConfig, servers: Sequence[Server], skip: Sequence[str]) -> dict[str, ExpectedChecksums]:
    sizes: dict[str, set[int]] = {}
    for server in servers:
        sizes.setdefault(server.device, set()).add(server.tp_size)
    return {each: ExpectedChecksums(hf, tp_sizes, device=each, skip=skip) for each, tp_sizes in sizes.items()}


def _skipped(hf: HFConfig, version: int, config: WeightSyncConfig) -> tuple[str, ...]:
    """Parts of the names of server tensors that a sync to `version` does not compare.

    A note that our loader has left in an attempt that was given up is no tensor of the model.
    """
    sampled = sampled_out(hf.num_layers, version) if config.verify == "sample" else ()
    return (*config.unverified, *sampled, FAILED)
