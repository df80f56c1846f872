"""A server that takes weights as SGLang does and keeps them under their Hugging Face names; it samples nothing.

For models that SGLang does not run on CPU. It refuses what SGLang refuses (weights outside an update session), and
more: weights while it is not paused, and a tensor that comes twice in a session. Run as `python -m
tests.support.receiver OUT`: it prints its URL, and writes what it holds to OUT/N.pt whenever it is told a version, N
from 0.
"""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import HashStore, ProcessGroup

from benchmarks.gpu.receiving import Reply, serve
from megatron_rpp.rollout.in_server import delta_loader
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from tests.support.sglang_parts import custom_process_group, server_checksums, tensor_bucket


class Refused(Exception):
    """The client asked for something out of turn."""


class Receiver:
    """What the server knows. Its methods are called from a thread a request."""

    def __init__(self, out: Path) -> None:
        self._out, self._lock = out, Lock()
        self._groups: dict[str, ProcessGroup] = {}
        self._is_paused = self._is_open = False
        self._finished = 0  # syncs
        self._version = "default"
        self._tensors: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the present session
        self._bucket_sizes: list[int] = []  # of the last session, in bytes

    def endpoints(self) -> dict[str, Callable[[Reply], Reply]]:
        """By path. What is missing here is answered by 404."""
        return {
            "/health": lambda _: {},
            "/server_info": lambda _: {"tp_size": 1, "device": "cpu", "custom_weight_loader": [LOADER]},
            "/model_info": lambda _: {"weight_version": self._version},
            "/v1/loads": lambda _: {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]},
            "/flush_cache": lambda _: {},
            "/pause_generation": lambda _: self._pause(is_paused=True),
            "/continue_generation": lambda _: self._pause(is_paused=False),
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
            "/init_weights_update_group": self._join,
            "/update_weights_from_distributed": self._take,
            "/update_weights_from_disk": self._load,
            "/update_weights_from_tensor": self._change,
            "/update_weight_version": self._set_version,
            "/weights_checker": self._checksums,
        }

    def _pause(self, *, is_paused: bool) -> Reply:
        self._is_paused = is_paused
        return {}

    def _begin(self, body: Reply) -> Reply:
        if self._is_open:
            raise Refused("a weight update session is already open")
        self._is_open = True
        # What is not sent is missing, but for changes, which are made of what was there before.
        self._before, self._tensors, self._bucket_sizes = self._tensors, {}, []
        return {}

    def _end(self, body: Reply) -> Reply:
        if not self._is_open:
            raise Refused("no weight update session is open")
        self._is_open = False
        return {}

    def _join(self, body: Reply) -> Reply:
        self._groups[body["group_name"]] = custom_process_group(**body)
        return {}

    def _take(self, body: Reply) -> Reply:
        if not (self._is_open and self._is_paused):
            raise Refused("weights came outside an update session, or while generation was not paused")
        bucket = tensor_bucket().FlattenedTensorBucket.empty(body["names"], body["dtypes"], body["shapes"], "cpu")
        flat, named = bucket.get_flattened_tensor(), bucket.reconstruct_tensors()
        with self._lock:  # one after the other, as in SGLang's scheduler
            for tensor in [flat] if body["load_format"] == "flattened_bucket" else [tensor for _, tensor in named]:
                dist.broadcast(tensor, src=0, group=self._groups[body["group_name"]])
            self._bucket_sizes.append(flat.numel())
            self._keep((name, tensor.clone()) for name, tensor in named)
        return {}

    def _load(self, body: Reply) -> Reply:
        """Files that together have each tensor once."""
        if self._is_open or not self._is_paused:
            raise Refused("weights came from disk inside an update session, or while generation was not paused")
        self._tensors, self._bucket_sizes = {}, []
        for path in Path(body["model_path"]).glob("*.safetensors"):
            self._keep(load_file(path).items())
        return {}

    def _change(self, body: Reply) -> Reply:
        """Through the loader that SGLang servers are started with. It leaves what is not sent as it was."""
        if not (self._is_open and self._is_paused) or body["load_format"] != LOADER:
            raise Refused("a change came outside an update session, while generation was not paused, or to no loader")
        (entry,) = body["serialized_named_tensors"]
        self._tensors = self._tensors or self._before
        delta_loader.load(_Parameters(self._tensors), pickle.loads(base64.b64decode(entry)))
        return {}

    def _keep(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            if name in self._tensors:
                raise Refused(f"{name} came twice")
            self._tensors[name] = tensor

    def _set_version(self, body: Reply) -> Reply:
        self._version = body["new_version"]
        if self._version.isdigit():  # else it is not verified
            holds = {"tensors": self._tensors, "bucket_sizes": self._bucket_sizes}
            torch.save(holds, self._out / f"{self._finished}.pt")
            self._finished += 1
        return {}

    def _checksums(self, body: Reply) -> Reply:
        assert body["action"] == "checksum"
        place = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
        return {"ranks": [{"checksums": server_checksums(self._tensors), "parallelism_info": [place]}]}


class _Parameters(nn.Module):
    """What the loader takes for SGLang's model: parameters under their Hugging Face names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in named:
                self._tensors[name].copy_(tensor)


def answer(endpoint: Callable[[Reply], Reply] | None, body: Reply) -> tuple[int, Reply]:
    """(HTTP status, reply)."""
    if endpoint is None:
        return 404, {"message": "not here"}
    try:
        return 200, {"success": True} | endpoint(body)
    except (Refused, KeyError, RuntimeError, ValueError) as error:
        return 400, {"success": False, "message": f"{type(error).__name__}: {error}"}


def main(kind: type[Receiver] = Receiver) -> None:
    # SGLang's groups for weights stand beside a default group, too.
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    endpoints = kind(Path(sys.argv[1])).endpoints()
    serve(lambda path, body: answer(endpoints.get(path), body))


if __name__ == "__main__":
    main()
