"""One process that runs GPU tests until all have ended or it is lost.

    python -m tests.gpu.session JOURNAL FOLDER [pytest's arguments]

`python -m tests.gpu` starts it, and another one where it dies.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.gpu import table

OPTIONS = ("-q", "--no-header", "--no-summary", "--tb=short", "-p", "no:cacheprovider")


def gpu_is_lost() -> bool:
    """Whether this process's GPU answers no more, as behind an illegal access: every test after it would fail."""
    memory = sys.modules.get("megatron_rpp.device.memory")
    try:
        if memory is not None:
            memory.wait_for_device()
    except RuntimeError:
        return True
    return False


def leave(code: int) -> None:
    """At once: a GPU that is lost would keep the clean-up waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    journal, folder, *arguments = sys.argv[1:]
    plugin = table.Table(Path(journal), gpu_is_lost, leave)
    code = pytest.main([folder, *OPTIONS, "--continue-on-collection-errors", *arguments], plugins=[plugin])
    table.write(Path(journal), event="finished", code=int(code))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
