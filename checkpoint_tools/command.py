"""What the command-line tools share: exit codes, and a user's error as one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable

USER_ERROR = 2
INTERRUPTED = 130  # as shells report SIGINT


def run(tool: str, work: Callable[[], int], *, on_gpu: bool = False) -> int:
    """Exit code of `work`; a ValueError or OSError is told in one line, and the code is 2."""
    if not on_gpu and "torch" not in sys.modules:  # once torch is there, device/ may have chosen
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", module="megatron")  # it tells of every optional package that is not installed
    try:
        return work()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{tool}: error: {' '.join(str(error).split())}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{tool}: interrupted; run the same command again to continue\n")
        return INTERRUPTED


def parser(tool: str, documentation: str | None) -> argparse.ArgumentParser:
    """An argument parser whose description is the module's documentation."""
    return argparse.ArgumentParser(
        prog=tool, description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value
