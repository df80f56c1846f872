"""What a server's weight checker must report, predicted from the tensors that the trainer sends.

SGLang's `/weights_checker` hashes the server's own parameters: merged, cut by its tensor parallelism, padded.
Predicted are servers as `sglang.launch_server --tp-size N --disable-shared-experts-fusion` makes them. With
expert parallelism, attention data parallelism, pipeline stages, or a kernel that reorders weights
(`--moe-runner-backend flashinfer_trtllm`, Intel AMX, Marlin), digests differ though the weights are right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.fp8_blocks import BLOCK, SCALE_SUFFIX, dequantize
from megatron_rpp.weight_sync.checksum_report import is_skipped
from megatron_rpp.weight_sync.server_cuts import Cutter
from megatron_rpp.weight_sync.server_layout import Part, ServerLayout, derived, made_of
from megatron_rpp.weight_sync.server_parameter import ServerParameter

Digests = dict[int, list[dict[str, str]]]
"""TP size -> [server TP rank] -> {server parameter: digest}."""


class ExpectedChecksums:
    """What a server's weight checker will say of the tensors it is given, for servers of each of `tp_sizes`."""

    def __init__(
        self, hf: HFConfig, tp_sizes: Collection[int], *, device: str = "cpu", skip: Sequence[str] = ()
    ) -> None:
        """device: "cpu" or "cuda", of the servers; skip: server tensors with any of these in their names.

        Raises ConfigError for a model whose layout on a server is not known.
        """
        self._hf, self._layout, self._skip, self._device = hf, ServerLayout(hf), tuple(skip), device
        self._cutters = [Cutter(hf, tp_size, device) for tp_size in sorted(set(tp_sizes))]
        self._growing: dict[str, ServerParameter] = {}
        self._halves: dict[str, Tensor] = {}  # an FP8 weight that waits for its scales, or scales for their weight
        self._digests: Digests = {c.tp_size: [{} for _ in range(c.tp_size)] for c in self._cutters}

    def add(self, name: str, tensor: Tensor) -> None:
        """One whole HF-named tensor in the engine's dtype; it is not changed.

        It is hashed at once where its parameter's earlier parts have come, as `hf_tensors` gives them, else held until
        then (GPUs' hash takes 16 MiB at a time, so that less may wait too); it must keep its values so long.
        Raises ValueError for a tensor that comes twice, and for one that the server cannot have as it is.
        """
        if tensor.dtype == torch.float8_e4m3fn or name.endswith(SCALE_SUFFIX):
            self._add_fp8(name, tensor)
            return
        for part in self._layout.parts(name):
            if not is_skipped(part.parameter, self._skip):
                self._feed(name, part, tensor)
        for parameter, value in derived(name, tensor, self._hf).items():
            if not is_skipped(parameter, self._skip):
                self._feed(name, Part(parameter), value)

    def result(self) -> Digests:
        """The digests. Raises ValueError where parts of a server parameter have not come."""
        if self._halves:
            raise ValueError(f"FP8 weight and scales must come together; only one came of {sorted(self._halves)}")
        for parameter, growing in self._growing.items():
            raise ValueError(
                f"the trainer sent {growing.taken} of the {growing.count} parts of {parameter}, which is made of "
                f"{', '.join(made_of(parameter))}; came: {', '.join(growing.names)}"
            )
        return self._digests

    def _add_fp8(self, name: str, tensor: Tensor) -> None:
        """SGLang hashes an FP8 weight as the bfloat16 that it stands for."""
        weight = name.removesuffix(SCALE_SUFFIX)
        if all(is_skipped(part.parameter, self._skip) for part in self._layout.parts(weight)):
            return
        if (other := self._halves.pop(weight, None)) is None:
            self._halves[weight] = tensor
            return
        w8, scale_inv = (other, tensor) if name.endswith(SCALE_SUFFIX) else (tensor, other)
        if w8.shape[-1] % BLOCK[1]:  # SGLang's checker infers the block from the columns, and would take another
            raise ValueError(
                f"{weight} has {w8.shape[-1]} columns; an FP8 weight can be verified where they are a multiple of "
                f"{BLOCK[1]}; leave it out by weight_sync.unverified"
            )
        self.add(weight, dequantize(w8, scale_inv))

    def _feed(self, name: str, part: Part, tensor: Tensor) -> None:
        if part.parameter in self._digests[self._cutters[0].tp_size][0]:
            raise ValueError(f"{name} came again after its server parameter {part.parameter} was complete")
        if (growing := self._growing.get(part.parameter)) is None:
            growing = self._growing[part.parameter] = ServerParameter(part, self._cutters, self._device)
        growing.add(name, part, tensor)
        if growing.is_complete:
            for tp_size, digests in self._growing.pop(part.parameter).finish().items():
                for rank, digest in enumerate(digests):
                    self._digests[tp_size][rank][part.parameter] = digest


def merge(results: Iterable[Digests]) -> Digests:
    """Those of all pipeline stages in one. Raises ValueError where two stages tell of one parameter differently."""
    merged: Digests = {}
    for result in results:
        for tp_size, ranks in result.items():
            into = merged.setdefault(tp_size, [{} for _ in range(tp_size)])
            for rank, digests in enumerate(ranks):
                for parameter, digest in digests.items():
                    if into[rank].setdefault(parameter, digest) != digest:
                        raise ValueError(f"two pipeline stages hold different weights of {parameter}")
    return merged
