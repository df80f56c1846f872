"""A file that is written in pieces holds every byte, in order."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.model.hf_io.chunked_file import PIECE_BYTES, ChunkedFile


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
def test_what_is_written_in_pieces_is_whole_and_in_order(tmp_path: Path, size: int) -> None:
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    with ChunkedFile(tmp_path / "file", "wb") as file:
        assert file.write(b"head") == 4
        assert file.write(data.data) == size
    assert (tmp_path / "file").read_bytes() == b"head" + data.tobytes()


def test_a_call_that_writes_less_than_it_was_given_is_followed_by_another(tmp_path: Path) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:5])

    class SlowChunkedFile(ChunkedFile, Slow):
        pass

    with SlowChunkedFile(tmp_path / "file", "wb") as file:
        assert file.write(b"twenty-three characters") == 23
    assert (tmp_path / "file").read_bytes() == b"twenty-three characters"


def test_elements_wider_than_a_byte_are_counted_in_bytes(tmp_path: Path) -> None:
    values = torch.arange(PIECE_BYTES // 2, dtype=torch.int64).numpy()
    with ChunkedFile(tmp_path / "file", "wb") as file:
        assert file.write(values.data) == values.nbytes
    assert (tmp_path / "file").read_bytes() == values.tobytes()
