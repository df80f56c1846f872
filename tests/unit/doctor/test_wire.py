"""Lines of many probes arrive mixed; messages come out whole."""

from __future__ import annotations

import itertools

from megatron_rpp.doctor.wire import Assembler, to_lines


def test_lines_are_short_enough_that_srun_does_not_cut_them() -> None:
    lines = to_lines("n" * 64, {"text": "ü\n" * 5000})
    assert len(lines) > 10
    assert all(len(line.encode()) < 1024 and line.count("\n") == 1 for line in lines)


def test_mixed_lines_of_two_nodes_give_each_its_own_message() -> None:
    messages = {node: {"id": 1, "text": f"{node} \n ü " * 300} for node in ("node1", "node2")}
    lines = [to_lines(node, message) for node, message in messages.items()]
    mixed = list(itertools.chain.from_iterable(zip(*lines, strict=True)))
    assembler = Assembler()
    assert dict(filter(None, map(assembler.add, mixed))) == messages


def test_other_output_on_the_same_stream_is_passed_over() -> None:
    assembler = Assembler()
    assert assembler.add("Welcome to the cluster, enjoy your stay\n") is None
    first, *rest = to_lines("node1", {"text": "x" * 1500})
    assert assembler.add(first) is None and assembler.add("module load: done\n") is None
    assert [assembler.add(line) for line in rest][-1] == ("node1", {"text": "x" * 1500})


def test_a_message_that_lacks_a_piece_is_dropped_and_the_next_one_is_whole() -> None:
    assembler = Assembler()
    lines = to_lines("node1", {"text": "x" * 1500})
    assert [assembler.add(line) for line in (lines[0], lines[2])] == [None, None]
    assert assembler.add(to_lines("node1", {"id": 2})[0]) == ("node1", {"id": 2})
