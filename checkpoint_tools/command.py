"""What the command-line tools share: exit codes, and a user's error as one line."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable

USER_ERROR = 2
CRASHED = 70  # as sysexits.h has it
INTERRUPTED = 130  # as shells report SIGINT


def run(tool: str, work: Callable[[], int], *, on_gpu: bool = False) -> int:
    """Exit code of `work`; a ValueError or OSError is told in one line, and the code is 2."""
    if not on_gpu and "torch" not in sys.modules:  # once torch is there, device/ may have chosen
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", module="megatron")  # it tells of every optional package that is not installed
    try:
        return work()
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{tool}: error: {' '.join(str(error).split())}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{tool}: interrupted; run the same command again\n")
        return INTERRUPTED
    except Exception:  # ours, and never to be taken for an answer
        traceback.print_exc()
        return CRASHED


def parser(tool: str, documentation: str | None) -> argparse.ArgumentParser:
    """An argument parser whose description is the module's documentation."""
    return argparse.ArgumentParser(
        prog=tool, description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def not_negative(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    if not (math.isfinite(value := float(text)) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value
