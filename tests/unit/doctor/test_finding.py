"""Who is blamed: a wrong guess drains a healthy node."""

from __future__ import annotations

from megatron_rpp.doctor.finding import accuse, faults, in_words, most_common

NODES = ["node1", "node2", "node3", "node4"]


def test_a_node_that_cannot_find_one_other_is_at_fault_itself() -> None:
    assert accuse([("node2", "node4")], NODES) == {"node2": ["node4"]}


def test_a_node_that_finds_nobody_is_at_fault_itself() -> None:
    pairs = [("node2", other) for other in ("node1", "node3", "node4")]
    assert accuse(pairs, NODES) == {"node2": ["node1", "node3", "node4"]}


def test_a_node_that_nobody_finds_is_at_fault() -> None:
    pairs = [(asker, "node3") for asker in ("node1", "node2", "node4")]
    assert accuse(pairs, NODES) == {"node3": ["node1", "node2", "node4"]}


def test_of_two_nodes_the_one_that_complains_is_at_fault() -> None:
    assert accuse([("node1", "node2")], ["node1", "node2"]) == {"node1": ["node2"]}


def test_a_fault_of_all_nodes_goes_with_the_job_and_blames_none() -> None:
    (finding,) = faults("model", dict.fromkeys(NODES, "no tokenizer"), NODES, "copy it")
    assert (finding.node, finding.blames_node) == ("", False) and "all 4 nodes" in finding.found


def test_a_fault_of_some_nodes_blames_those() -> None:
    found = faults("model", {"node2": "no tokenizer"}, NODES, "copy it")
    assert [(each.node, each.blames_node) for each in found] == [("node2", True)]


def test_the_only_node_is_blamed_where_another_one_might_do() -> None:
    (here,) = faults("ports", {"node1": "in use"}, ["node1"], "end it", travels=False)
    (anywhere,) = faults("model", {"node1": "no tokenizer"}, ["node1"], "copy it")
    assert (here.blames_node, anywhere.blames_node) == (True, False)


def test_warnings_blame_nobody() -> None:
    (finding,) = faults("limits", {"node1": "1024 files"}, NODES, "ulimit", status="warn")
    assert not finding.blames_node


def test_most_nodes_decide_and_of_equally_many_the_first() -> None:
    assert most_common({"node1": "a", "node2": "b", "node3": "b"}) == "b"
    assert most_common({"node1": "a", "node2": "b"}) == "a"


def test_long_lists_of_names_are_cut() -> None:
    assert in_words(["a", "b", "c", "d"]) == "a, b, c, d"
    assert in_words(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
