"""What the weight-sync benchmark compares with: a plain gloo broadcast and a plain copy of the same bytes.

Two fresh processes, as trainer and server are, that do nothing else. They live as long as `PlainTransfers` and
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
    """A pair of processes, one with `sum(sizes)` bytes that it sends in buffers of `sizes` bytes. A context manager."""

    def __init__(self, sizes: Sequence[int], folder: Path) -> None:
        """folder: where the two find each other; a new one for each pair."""
        folder.mkdir(parents=True)
        given = (json.dumps(list(sizes)), str(folder / "store"))
        self._pair = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(rank), *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]

    def __enter__(self) -> PlainTransfers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._pair:
            assert process.stdin is not None
            process.stdin.close()  # ends their loop
            process.wait()

    def broadcast_s(self) -> float:
        """Seconds until the other process has all bytes, in memory that has been written to before."""
        return self._ask("broadcast", self._pair)[0]

    def copy_s(self) -> float:
        """Seconds that `tensor.copy_` takes for all bytes, into memory that has been written to before."""
        return self._ask("copy", self._pair[:1])[0]

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
    """One process of the pair: RANK, SIZES as a JSON list, the store's path. Answers each line with seconds."""
    rank, sizes = int(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], 2), rank=rank, world_size=2)
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
