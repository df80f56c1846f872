"""A file that is written in small pieces."""

from __future__ import annotations

import io
from typing import Any

PIECE_BYTES = 1 << 20


class ChunkedFile(io.FileIO):
    """An unbuffered file whose `write` takes everything it is given, a megabyte at a call of the system.

    ext4 fills its page cache several times more slowly where one call brings many megabytes: it looks for
    memory in pieces as large as the call. (A call may also write less than it was given, and 2 GiB at most.)
    """

    def write(self, data: Any) -> int:
        """The number of bytes of `data`, once all are written."""
        rest = memoryview(data).cast("B")
        total = rest.nbytes
        while rest.nbytes:
            rest = rest[super().write(rest[:PIECE_BYTES]) :]
        return total
