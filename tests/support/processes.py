"""Processes by their command lines, some of which may end while one looks."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Empty for one that has ended, also where nobody has waited for it yet."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one
        return []


def child_at(url: str) -> psutil.Process:
    """This process's child that serves `url`: the leader of the server's process group."""
    port = url.rpartition(":")[2]
    return next(child for child in psutil.Process().children() if port in command_line(child))
