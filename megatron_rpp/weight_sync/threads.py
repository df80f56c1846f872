"""Calls beside the main thread that keep nobody waiting: neither each other, nor the end of the process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(call: Callable[..., T], *args: Any) -> Future[T]:
    """Run `call` in a thread of its own. A pool would let a slow server hold up another, and Python wait at exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            # Its frames hold the future, and with it all that they know: neither would go before a full collection.
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
            future.set_exception(error.with_traceback(None))

    Thread(target=run, daemon=True).start()
    return future
