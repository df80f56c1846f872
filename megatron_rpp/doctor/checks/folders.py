"""Are the run's folders there on every node, writable, and the same folder everywhere?"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from megatron_rpp.doctor.finding import Finding, accuse, faults, in_words
from megatron_rpp.doctor.job import Job

VISIBLE_S = 5.0  # a network file system may show another node's new file late
_REMEDY = "mount the shared file system on the node, read and write, or drain the node: mount | grep {folder}"


def write(files: Mapping[str, str]) -> dict[str, str]:
    """Make each folder and write this node's file into it. files: {folder: name}. {folder: why it cannot be}."""
    errors = {}
    for folder, name in files.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with Path(folder, _mine(name)).open("w", encoding="utf-8") as file:
                file.write(_content(_mine(name)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            errors[folder] = f"cannot write to {folder}: {error.strerror}"
    return errors


def read(files: Mapping[str, Mapping[str, str]], limit_s: float) -> dict[str, dict[str, str]]:
    """{folder: {node: why its file cannot be read}}. files: {folder: {node: file}}."""
    end = time.monotonic() + limit_s
    wrong: dict[str, dict[str, str]] = {}
    for folder, of_nodes in files.items():
        for node, name in of_nodes.items():
            if error := _read_one(Path(folder, name), end):
                wrong.setdefault(folder, {})[node] = error
    return wrong


def _read_one(path: Path, end: float) -> str:
    while True:
        try:
            found = path.read_text(encoding="utf-8")
            return "" if found == _content(path.name) else f"{path} holds {found[:40]!r}, not what was written"
        except FileNotFoundError as error:
            if time.monotonic() > end:
                return str(error.strerror)
            time.sleep(0.1)
        except OSError as error:
            return str(error.strerror)


def remove(files: Mapping[str, str]) -> None:
    """This node's files."""
    for folder, name in files.items():
        try:
            Path(folder, _mine(name)).unlink(missing_ok=True)
        except OSError:
            continue  # the folder cannot be written, which `write` has told


def _mine(name: str) -> str:
    return f"{name}-{socket.gethostname()}"


def _content(name: str) -> str:
    return f"written by rpp doctor as {name}\n" * 64


def check(job: Job) -> list[Finding]:
    """Every node writes a file of its own; the first one's is read by all, and all by the first."""
    name = f".rpp-doctor-{uuid.uuid4().hex[:8]}"
    files = {folder: name for folder in job.folders().values()}
    unwritten = job.ask("folders", "folders.write", job.nodes, files=files)
    findings = _unwritable(unwritten)
    unread: dict[str, Mapping[str, Mapping[str, str]]] = {}
    try:
        writers = {f: [n for n, errors in unwritten.items() if f not in errors] for f in files}
        first = {f: {n: f"{name}-{job.hosts[n]}" for n in nodes[:1]} for f, nodes in writers.items()}
        unread |= job.ask("folders", "folders.read", job.nodes, files=first, limit_s=VISIBLE_S)
    finally:
        job.ask("folders", "folders.remove", job.nodes, files=files)
    findings += judge(unread, files)
    return findings or [Finding("folders", "ok", f"{in_words(list(job.folders()))}: written and read on every node")]


def _unwritable(answers: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    findings = []
    for folder in sorted({folder for errors in answers.values() for folder in errors}):
        messages = {node: errors[folder] for node, errors in answers.items() if folder in errors}
        findings += faults("folders", messages, answers, _REMEDY.format(folder=folder))
    return findings


def judge(answers: Mapping[str, Mapping[str, Mapping[str, str]]], folders: Mapping[str, str]) -> list[Finding]:
    """answers: of each node, {folder: {writer: why its file cannot be read}}."""
    findings = []
    for folder in folders:
        wrong = {
            (reader, writer): error
            for reader, errors in answers.items()
            for writer, error in errors.get(folder, {}).items()
        }
        for node, others in accuse(list(wrong), answers).items():
            reader, writer = (node, others[0]) if (node, others[0]) in wrong else (others[0], node)
            found = f"{folder} is not the same folder: {reader} does not see what {writer} wrote"
            found += f" ({wrong[reader, writer]})"
            findings.append(Finding("folders", "fail", found, _REMEDY.format(folder=folder), node, True))
    return findings
