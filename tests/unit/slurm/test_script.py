"""The rendered batch script asks for what the configuration says, and for nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp import cli
from megatron_rpp.config import Config
from megatron_rpp.config.fields import build
from megatron_rpp.slurm.script import render


def directives(text: str) -> list[dict[str, str]]:
    """#SBATCH options by name, a dictionary for each part of the job."""
    parts = text.split("#SBATCH hetjob\n")
    return [dict(re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", part, re.M)) for part in parts]


def test_a_plain_configuration_asks_for_no_account_and_no_gpus() -> None:
    [options] = directives(render(build({"run.dir": "runs/a"}), nodes=4))
    assert options["--nodes"] == "4" and options["--signal"] == "B:USR1@300"
    assert options["--output"] == "runs/a/logs/slurm-%j.txt"
    assert {"--requeue", "--open-mode", "--exclusive"} <= options.keys()
    assert not {"--account", "--partition", "--qos", "--gpus-per-node"} & options.keys()
    assert "CHANGE_ME" not in render(build({}), nodes=1)


def test_options_of_the_configuration_are_in_every_part() -> None:
    wanted = {"account": "team", "partition": "h200", "qos": "high", "time": "1-00:00:00"}
    config = build({**{f"slurm.{k}": v for k, v in wanted.items()}, "slurm.gpus_per_node": 8, "slurm.rollout_nodes": 2})
    trainer, rollout = directives(render(config, nodes=6))
    for part in (trainer, rollout):
        assert {f"--{k}": part[f"--{k}"] for k in wanted} == {f"--{k}": v for k, v in wanted.items()}
        assert part["--gpus-per-node"] == "8"
    assert (trainer["--nodes"], rollout["--nodes"]) == ("4", "2")
    assert "--signal" not in rollout, "only the batch script's part is signalled"
    assert "--no-kill" in rollout, "a dead server node must not end the job"


def test_directives_stand_before_the_first_command_and_setup_before_the_start() -> None:
    more = {"slurm.setup": "module load cuda", "slurm.partition": "h200", "slurm.sbatch_args": ("--mail-type=END",)}
    text = render(build(more), nodes=1)
    assert "\n#SBATCH --mail-type=END\n" in text
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert text.rindex("#SBATCH") < text.index("set -euo"), "sbatch reads none behind the first command"
    assert commands[1:3] == ["module load cuda", f"RPP_PYTHON={sys.executable}"]
    assert commands[-1] == 'exec "$RPP_PYTHON" -m megatron_rpp.cli slurm-job "$@"'
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


Make = Callable[..., Config]


@pytest.fixture
def toml(make: Make, model_dir: Path, tmp_path: Path) -> Path:
    """A valid configuration for 8 ranks, whose model has a tokenizer."""
    from megatron_rpp.config.load import dump_toml
    from tests.support.tokenizer_dirs import write_fast

    model = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**model, "vocab_size": 64}))
    write_fast(model_dir)
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(make({"parallel.pipeline": 4, "parallel.data": 2, "run.dir": str(tmp_path / "run")})))
    return path


def test_dry_run_submits_and_writes_nothing_and_shows_the_script(toml: Path, capsys: Any) -> None:
    assert cli.main(["launch", "slurm", str(toml), "--nodes", "4", "--dry-run", "--slurm.account=team"]) == 0
    shown = capsys.readouterr().out
    assert "TP 1 x PP 4 x DP 2 = 8 ranks, 2 on each" in shown and "#SBATCH --account=team" in shown
    assert "data.train: of the first " in shown and " tokens; limit " in shown, "how long prompts are"
    assert shown.rstrip().endswith(f"job.sbatch {toml} --slurm.account=team")
    assert not (toml.parent / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3"], "3 trainer nodes must divide the 8 ranks of parallel.tensor=1 x"),
        (["--nodes", "2", "--slurm.gpus_per_node=2"], "more than slurm.gpus_per_node=2; ask for 4 trainer nodes"),
        (["--nodes", "2", "--slurm.rollout_nodes=2"], "--nodes 2 must be above slurm.rollout_nodes=2"),
        (["--nodes", "4", "--slurm.gpus_per_node=2", "--rollout.server_tensor=4"], "must be at most slurm.gpus_per_n"),
        (["--nodes", "4", "--rollout.urls=http://a:1"], "rollout.urls and rollout.urls_file must be empty"),
        (["--nodes", "many"], "--nodes many must be a number of nodes"),
        ([], "--nodes must be a number of nodes"),
        (["--nodes", "4", "--slurm.container_runtime=docker"], "must be one of: pyxis, apptainer"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(
    toml: Path, capsys: Any, words: list[str], message: str
) -> None:
    assert cli.main(["launch", "slurm", str(toml), *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and "submitted" not in shown.out
    assert not (toml.parent / "run").exists()


def test_tensor_parallelism_does_not_cross_nodes(toml: Path, capsys: Any) -> None:
    split = ["--parallel.tensor=2", "--parallel.pipeline=1", "--parallel.data=1"]
    assert cli.main(["launch", "slurm", str(toml), "--nodes", "2", *split]) == 2
    assert "parallel.tensor=2 must divide the 1 ranks of a node" in capsys.readouterr().err
