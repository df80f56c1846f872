"""tests.support.receiver, whose weights look wrong while OUT/wrong exists."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu.receiving import Reply
from tests.support import receiver
from tests.support.receiver import Receiver


class WrongReceiver(Receiver):
    """As of a server that somebody has started with another model."""

    def endpoints(self) -> dict[str, Callable[[Reply], Reply]]:
        return {**super().endpoints(), "/weights_checker": self._wrong_checksums}

    def _wrong_checksums(self, body: Reply) -> Reply:
        reply = self._checksums(body)
        if (self._out / "wrong").exists():
            checksums = reply["ranks"][0]["checksums"]
            checksums[next(iter(checksums))] = "0" * 16
        return reply


if __name__ == "__main__":
    receiver.main(WrongReceiver)
