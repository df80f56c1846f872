"""`rpp report RUN_DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rpp.commands.words import answer_help
from megatron_rpp.config.errors import ConfigError

_USAGE = """\
rpp report RUN_DIR

Prints a summary of a run, also of one that is under way, and draws RUN_DIR/curve.png.
"""


def run(words: Sequence[str]) -> int:
    """Print a run's summary and draw its curve."""
    answer_help(words, _USAGE)
    if len(words) != 2 or words[1].startswith("-"):
        raise ConfigError("write: rpp report RUN_DIR")
    from megatron_rpp.observability.report import draw, summary

    path = draw(Path(words[1]))
    sys.stdout.write(f"{summary(Path(words[1]))}\n{path}\n")
    return 0
