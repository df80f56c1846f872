from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.load import ConfigError, describe, dump_toml, load_config


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_later_files_then_the_command_line_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", "[run]\nsteps = 1\nseed = 1\n[optimizer]\nlr = 1\n")
    second = write(tmp_path / "b.toml", "[run]\nsteps = 2\n")
    config = load_config([first, second], ["--run.dir=x", "--run.steps=3"])
    assert (config.run.steps, config.run.seed, config.run.dir) == (3, 1, "x")
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)


def test_a_later_table_replaces_task_args_whole(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", "[data.train.task_args]\nmin_terms = 2\nmax_terms = 3\n")
    second = write(tmp_path / "b.toml", "[data.train.task_args]\nlevels = 5\n")
    assert load_config([first, second], []).data.train.task_args == {"levels": 5}


def test_every_type_can_be_set_on_the_command_line() -> None:
    config = load_config(
        [],
        [
            "--parallel.sequence=true",
            "--algorithm.kl_coef=1e-2",
            "--data.train.path=a=b.jsonl",
            '--data.train.task_args={min_terms = 2, names = ["x", "y"]}',
            "--rollout.urls=http://a:1, http://b:2",
            '--rollout.server_args=["--a=1,2", "--b"]',
        ],
    )
    assert config.parallel.sequence is True
    assert config.algorithm.kl_coef == 0.01
    assert config.data.train.path == "a=b.jsonl"
    assert config.data.train.task_args == {"min_terms": 2, "names": ["x", "y"]}
    assert config.rollout.urls == ("http://a:1", "http://b:2")
    assert config.rollout.server_args == ("--a=1,2", "--b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[algorithm]\nkl_coeff = 1.0",
            "unknown key algorithm.kl_coeff in {}; did you mean algorithm.kl_coef?",
        ),
        ("[algoritm]\ngamma = 1.0", "unknown key algoritm.gamma in {}; did you mean algorithm.gamma?"),
        ("[train]\nkl_coef = 1.0", "unknown key train.kl_coef in {}; did you mean algorithm.kl_coef?"),
        ("[data.train.nested]\nx = 1", "unknown key data.train.nested.x in {}; "),
        ("zzz = {}", "unknown key zzz in {}; `rpp train --help` lists every key"),
        ("run = 3", "run in {} is a section; set one of its keys, such as run.dir"),
        ("[run]\nsteps = 1.0", "run.steps=1.0 in {} must be of type int"),
        ("[run]\nsteps = true", "run.steps=True in {} must be of type int"),
        ('[optimizer]\nlr = "1"', "optimizer.lr='1' in {} must be of type float"),
        ("[optimizer]\nlr = true", "optimizer.lr=True in {} must be of type float"),
        ("[parallel]\nsequence = 1", "parallel.sequence=1 in {} must be of type bool"),
        ("[rollout]\nurls = [1]", "rollout.urls=[1] in {} must be of type list of str"),
        ('[rollout]\nurls = "x"', "rollout.urls='x' in {} must be of type list of str"),
        ("[run]\nsteps = = 1", "{} is not valid TOML: "),
    ],
)
def test_a_bad_file_is_named_with_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "demo.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([path], [])
    head, _, rest = message.partition("{}")
    assert str(caught.value).startswith(head + path + rest)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--run.steps=1e3", "run.steps=1e3 on the command line must be of type int"),
        ("--run.steps", "cannot read the argument '--run.steps'; settings are written --section.key=value"),
        ("-run.steps=1", "cannot read the argument '-run.steps=1'; settings are written --section.key=value"),
        ("--parallel.sequence=yes", "parallel.sequence=yes on the command line must be of type bool"),
        ("--data.train.task_args={", "data.train.task_args={ on the command line must be of type table"),
        ("--run.stepz=1", "unknown key run.stepz in the command line; did you mean run.steps?"),
    ],
)
def test_a_bad_override_says_what_to_change(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (
            '[data.eval]\npath = "a.jsonl"',
            "data.eval.path in {}; a held-out set has a name: data.evals.NAME.path; or leave it out",
        ),
        (
            '[data]\neval = { kind = "parquet" }',
            "data.eval.kind in {}; a held-out set has a name: data.evals.NAME.kind; or leave it out",
        ),
        ("[data.eval]", "data.eval in {}; a held-out set has a name: data.evals.NAME; or leave it out"),
        ("[data.evals.x]\npaht = 1", "data.evals.x.paht in {}; did you mean data.evals.x.path?"),
    ],
)
def test_a_held_out_set_without_a_name_is_told_where_to_put_it(tmp_path: Path, text: str, meant: str) -> None:
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([path], [])
    assert str(caught.value) == "unknown key " + meant.format(path)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*absent\.toml: No such file"):
        load_config([str(tmp_path / "absent.toml")], [])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ['--run.dir=quo"te \\ tab\t\x7f é', "--optimizer.lr=1e-22", "--parallel.sequence=true"],
        ["--rollout.server_args=--a,--b=3", '--data.evals.x.task_args={"a b" = 1, c = {d = [1.5, true]}}'],
        ["--data.train.task_args={day = 2026-01-31}"],
    ],
)
def test_the_resolved_config_reads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config([], overrides)
    assert (config == Config()) == (not overrides)
    assert load_config([write(tmp_path / "c.toml", dump_toml(config))], []) == config


def test_every_field_has_a_docstring() -> None:
    assert [key for key, _, _, doc in describe() if not doc.strip()] == []


def test_every_docstring_is_one_line() -> None:
    assert [key for key, _, _, doc in describe() if "\n" in doc] == []


def test_describe_gives_types_and_the_defaults_in_force() -> None:
    rows = {key: (kind, default) for key, kind, default, _ in describe()}
    assert rows["data.train.size"] == ("int", 0)
    assert rows["eval.num_prompts"] == ("int", 256)
    assert rows["rollout.urls"] == ("list of str", ())
    assert rows["data.train.task_args"] == ("table", {})
