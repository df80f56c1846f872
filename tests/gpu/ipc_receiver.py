"""tests.support.receiver, which also opens CUDA IPC handles: `python -m tests.gpu.ipc_receiver OUT`."""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.receiving import Reply
from tests.support import receiver
from tests.support.receiver import Receiver, Refused


class IpcReceiver(Receiver):
    def endpoints(self) -> dict[str, Callable[[Reply], Reply]]:
        return {**super().endpoints(), "/update_weights_from_tensor": self._open}

    def _open(self, body: Reply) -> Reply:
        if not (self._is_open and self._is_paused):
            raise Refused("weights came outside an update session, or while generation was not paused")
        (payload,) = body["serialized_named_tensors"]  # one rank
        for name, tensor in pickle.loads(base64.b64decode(payload)):
            if name in self._tensors:
                raise Refused(f"{name} came twice")
            self._tensors[name] = tensor.cpu().clone()
        return {}


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.init()  # a handle is opened in a request's thread
    receiver.main(IpcReceiver)


if __name__ == "__main__":
    assert Path(sys.argv[1]).is_dir()
    main()
