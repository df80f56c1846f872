"""`rpp doctor` in real SLURM jobs: healthy nodes pass, and each planted fault is found, with its node and a remedy."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launch.cluster import ENDED, Cluster
from tests.launch.node_faults import listening, mounted, read_only
from tests.launch.runs import CONFIG, Run

PORT = 31500
CHECKS = [
    "answer", "clock", "names", "reach", "limits", "ports", "folders",
    "versions", "gpus", "layout", "model", "disk", "memory", "network",
]  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """One `rpp doctor` as a job."""

    exit_code: str  # as SLURM has it
    report: dict[str, Any]
    output: str

    def trouble(self, check: str, status: str = "fail") -> dict[str, dict[str, str]]:
        """{node: finding} of a check."""
        return {f["node"]: f for f in self.report["findings"] if f["check"] == check and f["status"] == status}


def visit(cluster: Cluster, folder: Path, demo: Path, allocation: list[str], *more: str) -> Visit:
    """The report lies beside the run, which may be what is broken."""
    log, report = folder / "doctor.log", folder / "report.json"
    words = [
        f"--model.path={demo / 'init'}",
        f"--data.train.path={demo / 'train.jsonl'}",
        f"--run.dir={folder / 'run'}",
    ]
    rpp = [sys.executable, "-m", "megatron_rpp.cli", "doctor", CONFIG, *words, f"--json={report}", *more]
    script = folder / "job.sh"
    script.write_text("#!/bin/sh\nexec " + " ".join(rpp) + "\n")
    job = cluster.submit([f"--output={log}", *allocation, script])
    state = cluster.wait(job, ENDED | {"COMPLETING"}, timeout_s=200)  # where a node is dead it stays so for long
    assert report.is_file(), cluster.story([state])
    return Visit(state["ExitCode"], json.loads(report.read_text()), log.read_text())


def test_a_healthy_heterogeneous_job_passes_every_check_on_the_nodes_of_both_parts(
    cluster: Cluster, demo: Path, tmp_path: Path
) -> None:
    script_options = ["--nodes=1", ":", "--nodes=1"]
    seen = visit(cluster, tmp_path, demo, script_options, "--slurm.rollout_nodes=1", "--rollout.registry=true")
    assert seen.exit_code == "0:0", seen.output
    assert seen.report["ok"] and seen.report["bad_nodes"] == []
    assert list(dict.fromkeys(finding["check"] for finding in seen.report["findings"])) == CHECKS
    assert [f for f in seen.report["findings"] if f["status"] != "ok"] == [], seen.output
    assert len(seen.report["trainer_nodes"]) == len(seen.report["rollout_nodes"]) == 1
    assert "gloo over 2 nodes" in seen.output and "2 nodes can run it" in seen.output
    assert not list((tmp_path / "run").rglob(".rpp-doctor-*")), "the doctor leaves nothing behind"
    Run(cluster, tmp_path / "run", ()).check_no_orphans(cluster.nodes)


def test_every_fault_of_one_node_among_four_is_found_and_its_node_is_named(
    cluster: Cluster, demo: Path, tmp_path: Path
) -> None:
    _, second, third, fourth = cluster.nodes[:4]
    weights, checkpoints = tmp_path / "weights", tmp_path / "run" / "checkpoints"
    weights.mkdir()
    checkpoints.mkdir(parents=True)
    model, without = demo / "init", tmp_path / "no-tokenizer"
    shutil.copytree(model, without, ignore=shutil.ignore_patterns("tokenizer*"))
    hosts, metadata = _without_name(cluster, fourth, tmp_path), _other_version("sglang", tmp_path)
    with ExitStack() as planted:
        planted.enter_context(mounted(cluster, second, Path("/etc/hosts"), "--bind", hosts))
        planted.enter_context(mounted(cluster, second, metadata, "--bind", tmp_path / "METADATA"))
        planted.enter_context(read_only(cluster, third, weights))
        planted.enter_context(listening(cluster, third, PORT))
        planted.enter_context(mounted(cluster, fourth, model, "--bind", without))
        planted.enter_context(mounted(cluster, fourth, checkpoints, "-t", "tmpfs", "-o", "size=1m", "small"))
        wrong = ["--parallel.tensor=8", "--parallel.pipeline=1", "--parallel.data=4"]
        wrong += ["--rollout.registry=true", f"--rollout.port={PORT}", f"--weight_sync.disk_path={weights}"]
        seen = visit(cluster, tmp_path, demo, ["--nodes=4", "--nodelist=node[1-4]"], *wrong)

    assert seen.exit_code == "1:0" and not seen.report["ok"], seen.output
    _check_fault(seen, "names", second, fourth, "/etc/hosts")
    _check_fault(seen, "versions", second, "sglang is 0.0.1", f"on {second}")
    _check_fault(
        seen, "folders", third, "Read-only file system", str(weights), also=fourth
    )  # its small disk is its own
    _check_fault(seen, "ports", third, f"port {PORT}: in use", "rollout.port")
    _check_fault(seen, "model", fourth, "no tokenizer here", str(model))
    _check_fault(seen, "disk", fourth, "has 0.00105 GB free", "free ")
    _check_fault(seen, "layout", "", "parallel.tensor=8 must divide num_attention_heads=6", "rpp plan")
    assert seen.report["bad_nodes"] == [second, third, fourth] and not seen.report["only_nodes_fail"]
    assert f"leave out with sbatch --exclude={second},{third},{fourth}" in seen.output


def test_a_dead_node_is_named_and_the_others_are_checked_all_the_same(
    cluster: Cluster, demo: Path, tmp_path: Path
) -> None:
    lost = cluster.nodes[2]
    cluster.kill_node(lost)
    layout = ["--parallel.pipeline=1", "--parallel.data=3", "--rollout.num_prompts=24", "--train.batch_size=48"]
    try:
        seen = visit(cluster, tmp_path, demo, ["--nodes=3", "--nodelist=node[1-3]"], *layout)
    finally:
        cluster.start_node(lost)
    assert seen.exit_code == "1:0"
    assert seen.report["bad_nodes"] == [lost] and seen.report["only_nodes_fail"], seen.output
    _check_fault(seen, "answer", lost, "could not start a process there", f"--exclude={lost}")
    assert [f["check"] for f in seen.report["findings"] if f["status"] != "ok"] == ["answer"], seen.output
    assert "gloo over 2 nodes" in seen.output, "the others have been checked to the end"


def _check_fault(seen: Visit, check: str, node: str, found: str, remedy: str, also: str = "") -> None:
    """The check blames this node alone (or one more), says what is wrong and what to do."""
    trouble = seen.trouble(check)
    assert node in trouble, f"{check}: {trouble}\n{seen.output}"
    assert found in trouble[node]["found"], trouble[node]
    assert remedy in trouble[node]["remedy"], trouble[node]
    assert set(trouble) == {node} | ({also} if also else set()), trouble


def _without_name(cluster: Cluster, name: str, folder: Path) -> Path:
    """An /etc/hosts that lacks one node."""
    lines = cluster.run(["cat", "/etc/hosts"], on=cluster.nodes[0]).stdout.splitlines(keepends=True)
    path = folder / "hosts"
    path.write_text("".join(line for line in lines if name not in line.split()))
    return path


def _other_version(package: str, folder: Path) -> Path:
    """Where the package's version is read from; FOLDER/METADATA gives it another."""
    distribution = importlib.metadata.distribution(package)
    path = next(p for p in Path(str(distribution.locate_file(""))).glob(f"{package}-*.dist-info/METADATA"))
    text = path.read_text(encoding="utf-8").replace(f"Version: {distribution.version}", "Version: 0.0.1", 1)
    (folder / "METADATA").write_text(text, encoding="utf-8")
    return path
