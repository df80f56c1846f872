"""Files that others may read at any moment, on any host."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace `path` by a file with `text`: whole or not at all, also where two write it at once.

    durable: it is on disk when this returns, and so survives a crash of the machine.
    """
    # Other threads, processes and hosts may write the same file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if durable:
            sync_path(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """What was written to the file or folder `path` is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
