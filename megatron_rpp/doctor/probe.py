"""The process on a node: reads questions, a JSON line each, and answers them. Started by the front alone.

    python -m megatron_rpp.doctor.probe WORKING_FOLDER

It ends with its standard input, and so with the front, whatever it does at that moment.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

from megatron_rpp.doctor.wire import to_lines
from megatron_rpp.parallel.environment import node_name

_CHECKS = "megatron_rpp.doctor.checks"
_GRACE_S = 3.0  # for a measurement that was under way


def main(words: list[str]) -> int:
    """Answer until the front goes."""
    out = _private_stdout()
    node = node_name()
    questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    _say(out, node, {"id": 0, "answer": {"host": socket.gethostname(), "folder_error": _enter(words[0])}})
    while (line := questions.get()) is not None:
        question = json.loads(line)
        if node in question["nodes"]:
            _say(out, node, {"id": question["id"], **_answer(question)})
    return 0


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    module, _, function = question["task"].partition(".")
    try:
        measure = getattr(importlib.import_module(f"{_CHECKS}.{module}"), function)
        return {"answer": measure(**question["about"])}
    except Exception as error:  # of any kind: it is this node's answer
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]}


def _private_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return out


def _read(questions: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        questions.put(line)
    questions.put(None)
    time.sleep(_GRACE_S)
    os._exit(0)  # a measurement that hangs must not outlive the front


def _say(out: TextIO, node: str, message: Mapping[str, Any]) -> None:
    for line in to_lines(node, message):
        out.write(line)
        out.flush()


def _enter(folder: str) -> str | None:
    """Relative paths of the configuration begin at the folder that the front runs in."""
    try:
        os.chdir(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
