"""A server that takes weights by IPC and copies them into memory of its own; it checks and samples nothing.

    python -m benchmarks.gpu.ipc_receiver

Prints its URL, and ends with its stdin. tests/support/receiver.py is the one that checks.
"""

from __future__ import annotations

import base64
import pickle

from torch import Tensor

from benchmarks.gpu.receiving import Reply, serve
from megatron_rpp.device import has_cuda, select
from megatron_rpp.device.memory import wait_for_device


class Receiver:
    """What it holds, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._version = "default"

    def answer(self, path: str, body: Reply) -> Reply:
        """As SGLang does on success."""
        if path == "/server_info":
            return {"tp_size": 1, "device": "cuda" if has_cuda() else "cpu"}
        if path == "/v1/loads":
            return {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]}
        if path == "/update_weights_from_tensor":
            self._take(body["serialized_named_tensors"][0])
        if path == "/update_weight_version":
            self._version = body["new_version"]
        return {"success": True, "weight_version": self._version}

    def _take(self, payload: str) -> None:
        for name, tensor in pickle.loads(base64.b64decode(payload)):
            if name in self._held:
                self._held[name].copy_(tensor)
            else:
                self._held[name] = tensor.clone()
        wait_for_device()  # the sender's buffer is its own again once this is answered


def main() -> None:
    select()
    receiver = Receiver()
    serve(lambda path, body: (200, receiver.answer(path, body)))


if __name__ == "__main__":
    main()
