"""What an error in a thread leaves behind."""

from __future__ import annotations

import gc
import weakref

from megatron_rpp.weight_sync.threads import in_thread


class Thing:
    """Stands for a store whose end others wait for."""


def test_an_error_keeps_nothing_alive_that_its_call_knew() -> None:
    """A store in a cycle with the error would live on until a full collection, and whoever waits in it would wait."""
    seen: list[weakref.ref[Thing]] = []

    def call() -> None:
        thing = Thing()
        seen.append(weakref.ref(thing))
        raise OSError("planted")

    gc.disable()
    try:
        error = in_thread(call).exception(timeout=10)
        assert seen[0]() is None
    finally:
        gc.enable()
    assert str(error) == "planted" and "in call" in error.__notes__[0], "where it was raised is told all the same"
