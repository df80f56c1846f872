"""Which errors of a rank only say that another rank has gone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch.distributed as dist

from megatron_rpp.parallel.exchange import OutOfStep

# gloo's errors are plain RuntimeErrors. Not "timed out" alone: that is also a server's.
_GLOO = re.compile(r"gloo|connection (was )?(closed|reset|refused)|socket closed|broken pipe", re.IGNORECASE)


def is_echo(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is that of a collective or a store whose peer is gone."""
    return any(isinstance(each, dist.DistError | OutOfStep) or _is_gloo(each) for each in _chain(error))


def _is_gloo(error: BaseException) -> bool:
    return type(error) is RuntimeError and _GLOO.search(str(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
