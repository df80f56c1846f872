"""Checks of a host and between hosts: each fault is found where it is, with what to do; what is right passes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.doctor.checks import clock, folders, gpus, limits, names, network, ports, reach, versions
from megatron_rpp.doctor.finding import Finding

Make = Callable[..., Config]

HOSTS = {"node1": "host1", "node2": "host2", "node3": "host3"}


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert finding.status == "ok" or finding.remedy, "every trouble has a remedy"
    return finding


def statuses(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.node, finding.status) for finding in findings]


def lookups(**changed: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each node finds; `node2={"host3": {...}}` changes one answer."""
    right = {
        host: {"addresses": [f"10.0.0.{i}"], "error": None, "seconds": 0.1} for i, host in enumerate(HOSTS.values())
    }
    return {node: {**right, **changed.get(node, {})} for node in HOSTS}


UNKNOWN = {"addresses": [], "error": "Name or service not known", "seconds": 0.1}
LOOPBACK = {"addresses": ["127.0.1.1"], "error": None, "seconds": 0.1}


def test_names_that_all_nodes_find_pass() -> None:
    assert only(names.judge(lookups(), HOSTS)).status == "ok"


def test_a_name_that_one_node_does_not_find_is_that_nodes_fault() -> None:
    finding = only(names.judge(lookups(node2={"host3": UNKNOWN}), HOSTS))
    assert (finding.node, finding.blames_node) == ("node2", True)
    assert "host3" in finding.found and "not known" in finding.found and "getent hosts host3" in finding.remedy


def test_a_name_that_is_loopback_elsewhere_is_a_fault() -> None:
    finding = only(names.judge(lookups(node1={"host1": LOOPBACK}), HOSTS))
    assert finding.node == "node1" and "127.0.1.1" in finding.found


def test_a_slow_resolver_is_a_warning() -> None:
    slow = {"addresses": ["10.0.0.9"], "error": None, "seconds": 5.2}
    finding = only(names.judge(lookups(node3={"host1": slow}), HOSTS))
    assert (finding.node, finding.status) == ("node3", "warn") and "resolv.conf" in finding.remedy


def test_a_resolver_that_never_answers_costs_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    (never, _open), real = socket.socketpair(), socket.getaddrinfo
    stuck = lambda name, *a, **k: never.recv(1) if name == "stuck" else real(name, *a, **k)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    found = names.measure(["stuck", "localhost"], 0.3)
    assert "no answer within 0.3 s" in found["stuck"]["error"] and not found["localhost"]["error"]


def test_a_connection_that_one_pair_cannot_open_names_both_ends() -> None:
    answers = {"node1": {}, "node2": {"node3": "10.0.0.3:5000: timed out"}, "node3": {}}
    finding = only(reach.judge(answers))
    assert finding.node == "node2" and "node3 at 10.0.0.3:5000: timed out" in finding.found


def test_an_open_port_is_reached_and_a_closed_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reach.connect({"node1": {"node2": ("127.0.0.1", port)}}, 1.0) == {}
    refused = reach.connect({"node1": {"node2": ("127.0.0.1", port)}}, 1.0)
    assert f"127.0.0.1:{port}: Connection refused" in refused["node2"]


@pytest.mark.parametrize(("ahead", "status"), [(0.5, "ok"), (3.0, "warn"), (-30.0, "fail")])
def test_a_clock_apart_from_the_others_is_named(ahead: float, status: str) -> None:
    finding = only(clock.judge({"node1": 0.0, "node2": ahead, "node3": 0.1}, dict.fromkeys(HOSTS, 0.01)))
    assert finding.status == status
    assert status == "ok" or (finding.node == "node2" and ("ahead" if ahead > 0 else "behind") in finding.found)


def test_a_slow_answer_is_no_wrong_clock() -> None:
    unsure = {"node1": 0.01, "node2": 5.0, "node3": 0.01}
    assert only(clock.judge({"node1": 0.0, "node2": 4.0, "node3": 0.0}, unsure)).status == "ok"


def test_a_version_of_its_own_is_the_fault_of_the_node_that_has_it() -> None:
    usual = {"torch": "2.13.0", "sglang": "0.5.23"}
    answers = {"node1": {**usual, "sglang": "0.5.1"}, "node2": usual, "node3": {**usual, "NCCL": "2.27"}}
    found = versions.judge(answers, ["torch"])
    assert [(f.node, f.found.partition(",")[0]) for f in found] == [
        ("node1", "sglang is 0.5.1"), ("node3", "NCCL is 2.27")
    ]  # fmt: skip
    assert "install sglang 0.5.23 on node1" in found[0].remedy


def test_a_package_that_is_nowhere_is_missing_only_where_it_is_needed() -> None:
    answers = {node: {"torch": "2.13.0", "sglang": versions.ABSENT} for node in HOSTS}
    assert only(versions.judge(answers, ["torch"])).status == "ok"
    finding = only(versions.judge(answers, ["torch", "sglang"]))
    assert (finding.node, finding.status) == ("", "fail") and "sglang" in finding.found


def test_edited_sources_are_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = versions._digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert versions._digest(tmp_path) != before


H100 = {"name": "H100", "memory_bytes": 80 * 2**30, "capability": [9, 0]}
A100 = {"name": "A100", "memory_bytes": 40 * 2**30, "capability": [8, 0]}


def test_nodes_without_gpus_pass_where_none_are_asked_for(make: Make) -> None:
    assert "on CPU" in only(gpus.judge({node: [] for node in HOSTS}, make())).found


def test_a_node_that_has_lost_a_gpu_is_named(make: Make) -> None:
    held = {"node1": [H100] * 8, "node2": [H100] * 7, "node3": [H100] * 8}
    finding = only(gpus.judge(held, make({"slurm.gpus_per_node": 8})))
    assert finding.node == "node2" and "7 GPUs are usable, not 8" in finding.found
    assert only(gpus.judge(held, make())).node == "node2", "also where the count is not configured"


def test_gpus_of_two_kinds_and_gpus_that_lack_float8_are_named(make: Make) -> None:
    held = {"node1": [H100], "node2": [H100], "node3": [A100]}
    found = gpus.judge(held, make({"weight_sync.dtype": "float8"}))
    assert [f.node for f in found] == ["node3", "node3"]
    assert "A100, the others' H100" in found[0].found and "8.9, A100 has 8.0" in found[1].found


def test_gpus_that_lack_the_fp8_recipe_are_named(make: Make) -> None:
    mixed = {"node1": [H100], "node2": [A100]}
    told = gpus.judge(mixed, make({"fp8.recipe": "tensorwise"}))[-1]
    assert told.node == "node2" and "fp8.recipe=tensorwise needs compute capability 8.9, A100 has 8.0" in told.found
    old = {"node1": [{**H100, "cuda": "12.4", "engine": "2.20.2"}]}
    assert "needs CUDA 12.9 or newer" in only(gpus.judge(old, make({"fp8.recipe": "blockwise"}))).found
    assert only(gpus.judge(old, make({"fp8.recipe": "delayed"}))).status == "ok"
    assert "transformer-engine" in versions.required(make({"fp8.recipe": "delayed"}))


def test_few_open_files_are_a_warning() -> None:
    enough = {"files": 65536, "locked_bytes": 65536, "has_infiniband": 0}
    answers = {"node1": enough, "node2": {**enough, "files": 1024}, "node3": {**enough, "has_infiniband": 1}}
    found = limits.judge(answers)
    assert statuses(found) == [("node2", "warn"), ("node3", "warn")]
    assert "ulimit" in found[0].remedy and "LimitMEMLOCK" in found[1].remedy


def test_a_port_in_use_is_found_and_a_free_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("", 0)) as free:
        taken, other = server.getsockname()[1], free.getsockname()[1]
        free.close()
        answer = ports.measure([taken, other])
    assert answer["taken"] == {taken: "in use"}
    quiet = {"taken": {}, "free_range": 28000}
    finding = only(ports.judge({"node1": quiet, "node2": answer}, [taken]))
    assert finding.node == "node2" and f"port {taken}: in use" in finding.found and "rollout.port" in finding.remedy


def test_each_server_of_a_node_has_a_port_of_its_own(make: Make) -> None:
    config = make({"rollout.port": 31000, "slurm.servers_per_node": 2, "rollout.num_servers": 3})
    assert ports.wanted_ports(config, True) == [31000, 31001]
    assert ports.wanted_ports(config, False) == [31000, 31001, 31002]


def test_a_folder_that_nodes_share_is_written_read_and_left_clean(tmp_path: Path) -> None:
    files = {str(tmp_path / "run"): ".probe"}
    mine = f".probe-{socket.gethostname()}"
    assert folders.write(files) == {}
    assert folders.read({str(tmp_path / "run"): {"node1": mine}}, 0.0) == {}
    (tmp_path / "run" / mine).write_text("something else")
    assert (
        "not what was written"
        in folders.read({str(tmp_path / "run"): {"node1": mine}}, 0.0)[str(tmp_path / "run")]["node1"]
    )
    folders.remove(files)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "run")
    assert "Not a directory" in folders.write({folder: ".probe"})[folder]


def test_a_node_with_a_folder_of_its_own_is_named_even_if_it_writes_first() -> None:
    absent = "No such file or directory"
    reader = folders.judge({"node1": {}, "node2": {"/run": {"node1": absent}}, "node3": {}}, {"/run": ""})
    writer = folders.judge(
        {"node1": {}, "node2": {"/run": {"node1": absent}}, "node3": {"/run": {"node1": absent}}}, {"/run": ""}
    )
    assert only(reader).node == "node2" and "does not see what node1 wrote" in only(reader).found
    assert only(writer).node == "node1" and "mount" in only(writer).remedy


def test_a_slow_pair_is_a_warning_that_names_both_nodes() -> None:
    nodes = list(HOSTS)
    answer = {"backend": "nccl", "all_reduce": 10e9, "from": {"1": 10e9, "2": 9e9}}
    slow = {"backend": "nccl", "all_reduce": 10e9, "from": {"0": 1e9, "1": 10e9}}
    found = network.judge({"node1": answer, "node2": {**answer, "from": {"0": 9e9, "2": 10e9}}, "node3": slow}, nodes)
    assert statuses(found) == [("node3", "warn"), ("", "ok")]
    assert "from node1 to node3 1.00 GB/s, of most pairs" in found[0].found and not found[0].blames_node


def test_limits_and_the_clock_of_this_host_are_read() -> None:
    assert limits.measure()["files"] != 0 and abs(clock.measure() - os.stat("/proc/self").st_mtime) < 3600
