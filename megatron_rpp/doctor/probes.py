"""The probes as the front has them: started together, asked together, each answer waited for only so long."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rpp.doctor.places import Group, probe_environment
from megatron_rpp.doctor.wire import Assembler

_LAUNCH_FAILED = re.compile(r"launch for .* failed on node (\S+?): (.*)")
_END_S = 4.0  # for probes to go once their input has ended

Launch = Callable[[Group, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Event:
    """A probe has said something, or (without a node) a step has ended."""

    step: Step
    node: str = ""
    message: Mapping[str, Any] | None = None


class Step:
    """One command that runs the probes of some nodes."""

    def __init__(self, group: Group, nodes: Sequence[str], command: list[str], events: queue.Queue[Event]) -> None:
        self.group, self.nodes, self.complaints = group, tuple(nodes), list[str]()
        self._events = events
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", env=probe_environment()
        )
        self._complaining = threading.Thread(target=self._read_complaints, daemon=True)
        self._complaining.start()
        threading.Thread(target=self._read, daemon=True).start()

    def write(self, line: str) -> None:
        """To every probe of the step: srun copies its standard input to all tasks."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which its reader tells

    def end(self) -> None:
        """End the probes with their input, or srun with them."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for stop in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(_END_S)
                return
            except subprocess.TimeoutExpired:
                stop()
        self._process.wait()

    def unlaunched(self) -> dict[str, str]:
        """Nodes that SLURM could not start a task on: {node: why}."""
        found = (_LAUNCH_FAILED.search(line) for line in self.complaints)
        return {match[1]: match[2] for match in found if match}

    def last_words(self, node: str) -> str:
        """What standard error had of the node, or at the end."""
        lines = [line for line in self.complaints if re.search(rf"\b{re.escape(node)}\b", line)] or self.complaints
        return "; ".join(lines[-2:])[:400]

    def _read(self) -> None:
        assert self._process.stdout is not None
        assembler = Assembler()
        for line in self._process.stdout:
            if said := assembler.add(line):
                self._events.put(Event(self, *said))
        self._complaining.join(_END_S)
        self._events.put(Event(self))

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.complaints = [*self.complaints[-199:], line.strip()]


class Probes:
    """One on each node that answers."""

    def __init__(self, groups: Iterable[Group], launch: Launch) -> None:
        """launch: the command that starts probes on some nodes of a group."""
        self.silent: dict[str, str] = {}  # nodes that have stopped answering, or never did, and why
        self._launch = launch
        self._events: queue.Queue[Event] = queue.Queue()
        self._steps = [self._step(group, group.nodes) for group in groups]
        self._asked = 0

    @property
    def nodes(self) -> list[str]:
        """Those that still answer, in the job's order."""
        every = dict.fromkeys(node for step in self._steps for node in step.group.nodes)
        return [node for node in every if node not in self.silent]

    def greet(self, limit_s: float) -> dict[str, dict[str, Any]]:
        """Wait for the first word of every node: {node: {"host", "folder_error"}}."""
        return {node: message["answer"] for node, message, _ in self._collect(0, self.nodes, limit_s)}

    def ask(
        self, task: str, about: Mapping[str, Any], nodes: Sequence[str], limit_s: float
    ) -> list[tuple[str, Mapping[str, Any], float]]:
        """`task` is a function of checks/, such as clock.measure, and `about` its arguments.

        (node, {"answer" or "error"}, when it came by time.time()) of each node that answers within the limit;
        the others are silent from now on.
        """
        self._asked += 1
        nodes = [node for node in nodes if node not in self.silent]
        line = json.dumps({"id": self._asked, "task": task, "about": about, "nodes": nodes}) + "\n"
        for step in self._steps:
            step.write(line)
        return self._collect(self._asked, nodes, limit_s)

    def close(self) -> None:
        for step in self._steps:
            threading.Thread(target=step.end).start()

    def _step(self, group: Group, nodes: Sequence[str]) -> Step:
        return Step(group, nodes, self._launch(group, nodes), self._events)

    def _collect(
        self, wanted_id: int, nodes: Sequence[str], limit_s: float
    ) -> list[tuple[str, Mapping[str, Any], float]]:
        end, missing = time.monotonic() + limit_s, set(nodes)
        got: dict[str, tuple[str, Mapping[str, Any], float]] = {}
        while missing:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if event.step not in self._steps:
                continue
            if event.message is None:
                missing |= self._replace(event.step, is_starting=wanted_id == 0)
            elif event.message["id"] == wanted_id and event.node in missing:
                got[event.node] = (event.node, event.message, time.time())
                missing.discard(event.node)
            missing -= set(self.silent)
        for node in missing:
            words = self._step_of(node).last_words(node)
            self.silent[node] = f"no answer within {limit_s:.0f} s" + (f" ({words})" if words else "")
        return [got[node] for node in nodes if node in got and node not in self.silent]

    def _replace(self, ended: Step, *, is_starting: bool) -> set[str]:
        """srun gives up all nodes of a step if one cannot be reached: start again on the others, which it returns."""
        unlaunched = ended.unlaunched()
        rest = [node for node in ended.nodes if node not in unlaunched and node not in self.silent]
        for node in ended.nodes:
            if node in unlaunched:
                self.silent[node] = f"SLURM could not start a process there: {unlaunched[node]}"
            elif not (is_starting and unlaunched):
                self.silent.setdefault(node, f"its probe ended: {ended.last_words(node) or 'without a word'}")
        if not (is_starting and unlaunched and rest):
            return set()
        self._steps[self._steps.index(ended)] = self._step(ended.group, rest)
        return set(rest)

    def _step_of(self, node: str) -> Step:
        return next(step for step in self._steps if node in step.group.nodes)
