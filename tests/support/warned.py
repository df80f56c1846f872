"""What the product warns of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """What is warned of by `logger` and those below it meanwhile."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    yield texts
    logging.getLogger(logger).removeHandler(handler)
