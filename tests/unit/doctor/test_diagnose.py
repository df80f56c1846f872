"""`rpp doctor` as a command: its exit codes, its report, and where it looks."""

from __future__ import annotations

import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp import cli
from megatron_rpp.commands.doctor import parse
from megatron_rpp.config import Config
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import SlurmConfig
from megatron_rpp.doctor import diagnose as diagnose_module
from megatron_rpp.doctor.diagnose import Diagnosis, diagnose
from megatron_rpp.doctor.finding import Finding
from megatron_rpp.doctor.job import Job
from megatron_rpp.doctor.places import Group, Places, find_places, probe_environment
from megatron_rpp.doctor.table import show, to_json

NODES = ("node1", "node2", "node3")
BAD_DISK = Finding("disk", "fail", "run.dir has 0 GB free", "free it", "node2", blames_node=True)
BAD_LAYOUT = Finding("layout", "fail", "parallel.tensor=3 must divide 4", "change it")


def diagnosis(*findings: Finding) -> Diagnosis:
    places = Places((), NODES, NODES, job_id="7")
    return Diagnosis(places, (Finding("answer", "ok", "3 of 3 nodes answer"), *findings), 1.0)


def shown(what: Diagnosis) -> str:
    out = io.StringIO()
    show(what, out)
    return out.getvalue()


def test_outside_of_slurm_this_host_alone_is_looked_at() -> None:
    places = find_places({})
    assert places.nodes == (socket.gethostname(),) and places.job_id == ""
    assert places.groups[0].command(places.nodes, SlurmConfig())[0] == sys.executable


def test_in_one_of_several_tasks_the_doctor_says_that_it_starts_itself_everywhere() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(ConfigError, match="without srun"):
        find_places(env)


def test_one_probe_a_node_is_started_in_the_container_of_the_run() -> None:
    argv = Group(NODES, ("--het-group=1",)).command(NODES[:2], SlurmConfig(container="image.sqsh"))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=node1,node2", "--overlap"} <= set(argv)
    assert argv.index("--container-image=image.sqsh") < argv.index("python3")


def test_a_probe_sees_all_gpus_of_its_node() -> None:
    env = probe_environment({"SLURM_GPUS_PER_TASK": "1", "SLURM_JOB_ID": "7", "PYTHONPATH": "/x"})
    assert "SLURM_GPUS_PER_TASK" not in env and env["SLURM_JOB_ID"] == "7" and env["PYTHONPATH"].endswith(":/x")


def test_the_report_names_bad_nodes_and_says_whether_leaving_them_out_helps() -> None:
    assert to_json(diagnosis(), ["a.toml"])["ok"]
    alone, both = (to_json(diagnosis(*each), []) for each in ([BAD_DISK], [BAD_DISK, BAD_LAYOUT]))
    assert (alone["bad_nodes"], alone["only_nodes_fail"], alone["ok"]) == (["node2"], True, False)
    assert (both["bad_nodes"], both["only_nodes_fail"]) == (["node2"], False)
    assert json.loads(json.dumps(both))["findings"][1]["remedy"] == "free it"


def test_the_table_names_node_and_remedy_of_each_trouble_and_ends_with_what_to_do() -> None:
    slow = Finding("network", "warn", "from node1 to node3 0.1 GB/s", "compare cables", "node3")
    text = shown(diagnosis(slow, BAD_DISK, BAD_LAYOUT))
    assert text.index("fail disk: node2: run.dir has 0 GB free") < text.index("warn network: node3")
    assert "do: free it" in text and "do: compare cables" in text
    assert text.rstrip().endswith("3 nodes cannot run it; leave out with sbatch --exclude=node2 (1 s)")
    assert "3 nodes can run it" in shown(diagnosis(slow))


def test_text_in_brackets_is_shown_as_it_is() -> None:
    assert "[Errno 5] bad [red]disk" in shown(
        diagnosis(Finding("disk", "fail", "[Errno 5] bad [red]disk", "x", "node1"))
    )


def test_what_the_deadline_leaves_no_time_for_is_a_failure_and_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(job: Job) -> list[Finding]:
        job.deadline = 0.0
        return [Finding("clock", "ok", "slow")]

    monkeypatch.setattr(diagnose_module, "CHECKS", (("clock", slow), ("disk", lambda job: [])))
    found = diagnose(Config(), find_places({}), 30.0)
    assert found.failed and found.findings[-1].check == "disk" and "--deadline" in found.findings[-1].remedy


def test_an_answer_that_is_an_error_is_a_finding_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(job: Job) -> list[Finding]:
        assert job.ask("clock", "clock.no_such", job.nodes) == {}
        return []

    monkeypatch.setattr(diagnose_module, "CHECKS", (("clock", check),))
    found = diagnose(Config(), find_places({}), 30.0)
    assert found.bad_nodes == [socket.gethostname()] and "no_such" in found.findings[-1].found


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no configuration file"),
        (["a.toml", "--json"], "--json must be followed by its value"),
        (["a.toml", "--deadline=soon"], "--deadline=soon must be a number of seconds"),
    ],
)
def test_mistakes_in_the_command_itself_are_told(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(["doctor", *words])


def test_options_are_told_from_settings() -> None:
    found = parse(["doctor", "a.toml", "--json", "x.json", "--run.dir=/r", "b.toml", "--deadline=9"])
    assert (found.files, found.overrides) == (("a.toml", "b.toml"), ("--run.dir=/r",))
    assert (found.json_file, found.deadline_s) == ("x.json", 9.0)


def test_an_unknown_key_is_the_users_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[run]\nstepz = 3\n")
    assert cli.main(["doctor", str(tmp_path / "a.toml")]) == 2
    assert "run.stepz" in capsys.readouterr().err


def test_the_exit_code_is_1_and_the_report_is_written_where_something_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(diagnose_module, "diagnose", lambda *a: made.append(a) or diagnosis(BAD_DISK))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "a.toml").write_text(f'[run]\ndir = "{tmp_path}/run"\n')
    assert cli.main(["doctor", str(tmp_path / "a.toml"), "--deadline", "7"]) == 1
    assert made[0][2] == 7.0
    assert json.loads((tmp_path / "run" / "doctor.json").read_text())["bad_nodes"] == ["node2"]
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", str(tmp_path / "a.toml"), f"--json={tmp_path}/file/x.json"]) == 1
    assert "cannot write" in capsys.readouterr().err
