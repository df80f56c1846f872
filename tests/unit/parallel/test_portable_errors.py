"""An exception that cannot be sent to other ranks is told in words, so that none waits for it in vain."""

from __future__ import annotations

import pickle
import threading

from megatron_rpp.parallel.collectives import portable


class TwoParts(Exception):
    """It pickles, and cannot be read again."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is down")


class Holder(Exception):
    """It cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def test_an_ordinary_exception_stays_what_it_is() -> None:
    error = ValueError("no such task")
    assert portable(error) is error


def test_what_cannot_be_pickled_or_read_again_becomes_its_words() -> None:
    for error, words in ((TwoParts("a", 1), "TwoParts: a:1 is down"), (Holder("gone"), "Holder: gone")):
        told = portable(error)
        assert type(told) is RuntimeError and told.__cause__ is error
        assert str(pickle.loads(pickle.dumps(told))) == words
