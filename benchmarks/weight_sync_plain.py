"""What the weight-sync benchmark compares with: a plain gloo broadcast and a plain copy of the same bytes.

Fresh processes, one a rank of trainer and servers, that do nothing else. They live as long as `PlainTransfers` and
work one request at a time, so that they can be measured in turns with the syncs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor


class PlainTransfers:
    """A process with `sum(sizes)` bytes that it sends in buffers of `sizes` bytes to others. A context manager."""

    def __init__(self, sizes: Sequence[int], folder: Path, receivers: int = 1) -> None:
        """folder: where they find each other; a new one for each object."""
        folder.mkdir(parents=True)
        given = (str(1 + receivers), json.dumps(list(sizes)), str(folder / "store"))
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(rank), *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(1 + receivers)
        ]

    def __enter__(self) -> PlainTransfers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # ends their loop
            process.wait()

    def broadcast_s(self) -> float:
        """Seconds until the other processes have all bytes, in memory that has been written to before."""
        return self._ask("broadcast", self._processes)[0]

    def copy_s(self) -> float:
        """Seconds that `tensor.copy_` takes for all bytes, into memory that has been written to before."""
        return self._ask("copy", self._processes[:1])[0]

    @staticmethod
    def _ask(what: str, processes: Sequence[subprocess.Popen[str]]) -> list[float]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
        replies = [process.stdout.readline() for process in processes if process.stdout is not None]
        if not all(replies):
            sys.exit("a process of the plain transfers has ended; its error is above")
        return [float(reply) for reply in replies]


def main() -> None:
    """One of the processes: RANK, RANKS, SIZES as a JSON list, the store's path. Answers each line with seconds."""
    rank, ranks, sizes = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[4], ranks), rank=rank, world_size=ranks)
    buffers = list(_ones(sum(sizes)).split(sizes))  # also on the receiver: what has come is kept, as weights are
    target = _ones(sum(sizes)) if rank == 0 else None
    for line in sys.stdin:
        if line.strip() == "broadcast":
            seconds = _broadcast(buffers)
        else:
            assert target is not None
            seconds = _copy(buffers, target)
        print(seconds, flush=True)
    dist.destroy_process_group()


def _broadcast(buffers: Sequence[Tensor]) -> float:
    dist.barrier()
    started = time.perf_counter()
    for buffer in buffers:
        dist.broadcast(buffer, 0)
    dist.barrier()  # the last bytes have arrived
    return time.perf_counter() - started


def _copy(buffers: Sequence[Tensor], target: Tensor) -> float:
    started = time.perf_counter()
    for part, buffer in zip(target.split([b.numel() for b in buffers]), buffers, strict=True):
        part.copy_(buffer)
    return time.perf_counter() - started


def _ones(size: int) -> Tensor:
    """[size] uint8, written to, so that no page is touched for the first time later."""
    return torch.ones(size, dtype=torch.uint8)


if __name__ == "__main__":
    main()
