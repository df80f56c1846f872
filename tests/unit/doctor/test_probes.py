"""The front and its probes: every node that can answer does, the others are named, and nothing waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rpp.doctor.places import Group
from megatron_rpp.doctor.probes import Probes

NODES = ("node1", "node2", "node3")
SRUN = str(Path(__file__).with_name("fake_srun.py"))


@contextmanager
def probes(faults: dict[str, str] | None = None, *groups: tuple[str, ...]) -> Iterator[Probes]:
    def launch(group: Group, nodes: Sequence[str]) -> list[str]:
        probe = [sys.executable, "-m", "megatron_rpp.doctor.probe", os.getcwd()]
        return [sys.executable, SRUN, json.dumps(faults or {}), ",".join(nodes), *probe]

    made = Probes([Group(nodes) for nodes in groups or (NODES,)], launch)
    try:
        yield made
    finally:
        made.close()


def asked(made: Probes, task: str, **about: object) -> dict[str, Mapping[str, Any]]:
    return {node: message for node, message, _ in made.ask(task, about, made.nodes, 20.0)}


def test_every_node_answers_each_question_also_with_one_longer_than_a_pipe_holds() -> None:
    with probes() as made:
        assert list(made.greet(20.0)) == list(NODES)
        files = {f"/no/such/folder/{index:05}": {"node": "file"} for index in range(3000)}
        answers = asked(made, "folders.read", files=files, limit_s=0.0)
        assert list(answers) == list(NODES)
        for message in answers.values():
            assert message["answer"] == {folder: {"node": "No such file or directory"} for folder in files}


def test_both_parts_of_a_heterogeneous_job_answer() -> None:
    with probes(None, ("node1", "node2"), ("node3",)) as made:
        assert sorted(made.greet(20.0)) == list(NODES)
        assert sorted(asked(made, "clock.measure")) == list(NODES)


def test_a_node_that_slurm_cannot_start_a_task_on_is_left_out_and_the_others_start_anew() -> None:
    with probes({"node2": "unlaunched"}) as made:
        assert list(made.greet(20.0)) == ["node1", "node3"]
        assert made.silent == {"node2": "SLURM could not start a process there: Connection failure"}
        assert list(asked(made, "clock.measure")) == ["node1", "node3"]


def test_a_node_without_an_answer_in_time_is_named_and_not_waited_for_again() -> None:
    with probes({"node3": "mute"}) as made:
        assert list(made.greet(3.0)) == ["node1", "node2"]
        assert made.silent["node3"] == "no answer within 3 s"
        start = time.monotonic()
        assert list(asked(made, "clock.measure")) == ["node1", "node2"]
        assert time.monotonic() - start < 2.0


def test_a_probe_that_dies_takes_no_other_with_it() -> None:
    with probes({"node1": "dead"}, ("node1",), ("node2", "node3")) as made:
        made.greet(2.0)
        assert "node1" in made.silent
        assert list(asked(made, "clock.measure")) == ["node2", "node3"]


def test_a_measurement_that_fails_is_an_answer_with_its_reason() -> None:
    with probes(None, ("node1",)) as made:
        made.greet(20.0)
        (message,) = asked(made, "names.no_such_function").values()
        assert "no_such_function" in str(message)


def test_a_probe_ends_with_its_front_even_in_a_measurement_that_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.json")  # opening it for reading never returns
    argv = [sys.executable, "-m", "megatron_rpp.doctor.probe", str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdin is not None and probe.stdout is not None
        host = probe.stdout.readline().split()[1]
        about = {"files": {str(tmp_path): {"node": "metadata.json"}}, "limit_s": 0.0}
        probe.stdin.write(json.dumps({"id": 1, "task": "folders.read", "about": about, "nodes": [host]}) + "\n")
        probe.stdin.close()
        assert probe.wait(timeout=15) == 0
