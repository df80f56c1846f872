"""One log file a rank: RUN_DIR/logs/rank-N.txt."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

LOGGER = "megatron_rpp"


def log_path(run_dir: str | Path, rank: int) -> Path:
    """The file that a rank logs to."""
    return Path(run_dir) / "logs" / f"rank-{rank}.txt"


def setup_logging(run_dir: str | Path, rank: int) -> logging.Logger:
    """Send the package's log records to the rank's file; rank 0's warnings also reach the terminal.

    Python warnings, of which Megatron and torch have many, go to the file alone.
    """
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(logging.FileHandler(path, encoding="utf-8"))
    if rank == 0:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.handlers[1].setLevel(logging.WARNING)
    logging.captureWarnings(True)
    python_warnings = logging.getLogger("py.warnings")
    python_warnings.propagate = False
    python_warnings.addHandler(logger.handlers[0])
    form = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    for handler in logger.handlers:
        handler.setFormatter(form)
    return logger


def append_log(run_dir: str | Path, rank: int, text: str) -> None:
    """Add `text` to the rank's file, as it stands."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(text)


def stderr_is_log(run_dir: str | Path, rank: int) -> bool:
    """Does this process's stderr end in the rank's file? The local launcher arranges that above rank 0."""
    try:
        return os.path.samestat(os.stat(log_path(run_dir, rank)), os.fstat(2))
    except OSError:  # no such file, or stderr is closed
        return False


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file; none where it does not exist."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
