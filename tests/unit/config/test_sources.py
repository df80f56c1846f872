"""Named sources in files and on the command line, and which of them can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build, flatten
from megatron_rpp.config.load import describe, dump_toml, load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, training_sources
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]

TOML = """
[data.sources.math]
path = "math.jsonl"
weight = 2
[data.sources.chains]
kind = "reasoning_gym"
task = "chain_sum"
task_args = { min_terms = 2 }
weight = 1.5
[data.evals.aime-24]
path = "aime.jsonl"
[eval]
pass_at = [1, 8]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("math.jsonl", "aime.jsonl", "other.jsonl", "rows.parquet"):
        (tmp_path / name).write_text('{"prompt": "1+1", "answer": "2"}\n')
    return tmp_path


def test_named_sources_come_from_files_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    more = ["--data.sources.math.weight=3", "--data.sources.new_one.path=new.jsonl", "--eval.pass_at=2, 4"]
    config = load_config([str(path)], more)
    sources = training_sources(config.data)
    assert [(name, source.weight) for name, source in sources.items()] == [
        ("math", 3.0),
        ("chains", 1.5),
        ("new_one", 0),
    ]
    assert sources["chains"].task_args == {"min_terms": 2} and sources["new_one"].size == 0
    assert list(held_out_sources(config)) == ["aime-24"] and config.eval.pass_at == (2, 4)
    (tmp_path / "resolved.toml").write_text(dump_toml(config))
    assert load_config([str(tmp_path / "resolved.toml")], []) == config
    assert build(flatten(config)) == config


def test_without_named_sources_data_train_is_used_and_nothing_is_held_out() -> None:
    config = load_config([], ["--data.train.path=a", "--data.evals.x.path=b"])
    assert training_sources(config.data) == {"": config.data.train}
    assert held_out_sources(config) == {"x": config.data.evals["x"]}
    assert held_out_sources(load_config([], ["--data.evals.x.path=b", "--eval.interval=0"])) == {}
    assert held_out_sources(load_config([], [])) == {}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.sources.math.wieght=1", "unknown key data.sources.math.wieght in the command line; "
         "did you mean data.sources.math.weight?"),
        ("--data.sources.math=1", "data.sources.math in the command line is a section; set one of its keys, such as "
         "data.sources.math.kind"),
        ("--data.sources=1", "data.sources in the command line is a section; set one of its keys, such as "
         "data.sources.NAME.kind"),
        ("--data.sources.a b.path=x", "data.sources.a b.path in the command line: the name 'a b' must be of letters"),
        ("--data.evals.x.weight=many", "data.evals.x.weight=many on the command line must be of type float"),
        ("--eval.pass_at=1,two", "eval.pass_at=1,two on the command line must be of type list of int"),
        ('--eval.pass_at=["1"]', 'eval.pass_at=["1"] on the command line must be of type list of int'),
    ],
)  # fmt: skip
def test_a_mistake_in_a_named_source_is_told_in_its_own_name(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [argument])
    assert str(caught.value).startswith(message)


def test_a_quoted_name_with_a_dot_is_refused_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data.sources."a.b"]\npath = "x"\n')
    with pytest.raises(ConfigError, match=r"unknown key data\.sources\.a\.b\.path"):
        load_config([str(tmp_path / "a.toml")], [])


def test_help_explains_named_sources() -> None:
    rows = {key: (kind, default, doc) for key, kind, default, doc in describe()}
    kind, default, doc = rows["data.sources.NAME.weight"]
    assert (kind, default) == ("float", 0.0) and "share" in doc
    assert rows["eval.pass_at"][0] == "list of int" and "data.sources" not in rows


def sources(files: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.train.path": "",
        "data.sources.math.path": str(files / "math.jsonl"),
        "data.sources.other.path": str(files / "other.jsonl"),
        "data.evals.aime.path": str(files / "aime.jsonl"),
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def test_a_mix_with_held_out_sets_passes(make: Make, files: Path) -> None:
    validate(make(sources(files)), "train")
    weights = {"data__sources__math__weight": 2.0, "data__sources__other__weight": 1.0}
    validate(make(sources(files, **weights, eval__samples=8, eval__pass_at=(1, 8))), "train")
    rows = str(files / "rows.parquet")
    validate(make({**sources(files), "data.sources.math.kind": "parquet", "data.sources.math.path": rows}), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train.path": "x.jsonl"}, "data.train and data.sources are both set"),
        ({"data.sources.math.weight": 1.0}, "data.sources.other.weight is not set, but others are"),
        ({"data.sources.math.weight": -1.0}, "data.sources.math.weight=-1.0 must be at least 0"),
        ({"data.sources.math.kind": "json"}, "data.sources.math.kind=json must be one of: jsonl, parquet"),
        ({"data.sources.math.path": ""}, "data.sources.math.path is not set; pass --data.sources.math.path=FILE.jsonl"),
        ({"data.sources.math.path": "/absent"}, "data.sources.math.path=/absent must be an existing file"),
        ({"data.sources.math.kind": "huggingface"}, "data.sources.math.path="),
        (
            {"data.sources.math.split": "train"},
            "data.sources.math.split=train must go with data.sources.math.kind=hugging",
        ),
        ({"data.sources.math.reward": "maths"}, "data.sources.math.reward=maths must be empty or one of: math_answer"),
        (
            {"data.sources.math.reward": "reasoning_gym"},
            "data.sources.math.reward=reasoning_gym must go with data.sources.math.k",
        ),
        ({"data.sources.math.max_pass_rate": 1.5}, "data.sources.math.max_pass_rate=1.5 must be between 0 and 1"),
        (
            {"data.sources.math.min_pass_rate": 0.5, "data.sources.math.max_pass_rate": 0.25},
            "data.sources.math.min_pass_rate=0.5 must be at most data.sources.math.max_pass_rate=0.25",
        ),
        ({"data.evals.aime.weight": 1.0}, "data.evals.aime.weight=1.0 has no meaning"),
        ({"data.evals.aime.path": ""}, "data.evals.aime.path is not set"),
        ({"data.evals.aime.size": -1}, "data.evals.aime.size=-1 must be at least 0"),
        (
            {"data.sources.gym.kind": "reasoning_gym", "data.sources.gym.task": "x", "data.curriculum": "easy_first"},
            "data.sources.gym.kind=reasoning_gym has no known pass rates",
        ),
        ({"data.curriculum": "hard_first"}, "data.curriculum=hard_first must be one of: none, easy_first"),
        ({"eval.pass_at": (1, 0)}, "eval.pass_at=0 must be at least 1"),
        ({"eval.pass_at": (4, 4), "eval.samples": 4}, "eval.pass_at=4,4 names a number twice"),
        ({"eval.pass_at": (1, 8), "eval.samples": 4}, "eval.pass_at=8 must be at most eval.samples=4"),
    ],
)
def test_a_source_that_cannot_run_is_named(make: Make, files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make({**sources(files), **changes}), "train")
    assert str(caught.value).startswith(message)


def test_a_held_out_set_that_is_trained_on_is_refused(make: Make, files: Path) -> None:
    math = str(files / "math.jsonl")
    with pytest.raises(ConfigError, match=r"data\.evals\.aime must differ from data\.sources\.math, in its path"):
        validate(make({**sources(files), "data.evals.aime.path": math}), "train")
    other_way = str(files / "." / "sub" / ".." / "math.jsonl")
    (files / "sub").mkdir()
    asked = {"path": other_way, "answer_key": "solution", "prompt_template": "{problem}", "min_pass_rate": 0.75}
    with pytest.raises(
        ConfigError, match=r"data\.evals\.x must differ from data\.sources\.math, .* both ends included"
    ):
        validate(make({**sources(files), **{f"data.evals.x.{key}": value for key, value in asked.items()}}), "train")


@pytest.mark.parametrize(
    ("train", "held_out", "is_refused"),
    [
        ({"max_pass_rate": 0.5}, {"min_pass_rate": 0.51}, False),
        ({"min_pass_rate": 0.75}, {"max_pass_rate": 0.5}, False),
        ({"max_pass_rate": 0.5}, {"min_pass_rate": 0.5}, True),  # both ends belong to a slice
        ({"min_pass_rate": 0.2, "max_pass_rate": 0.8}, {"min_pass_rate": 0.4, "max_pass_rate": 0.6}, True),
        ({"max_pass_rate": 0.5}, {"min_pass_rate": 0.51, "pass_rate_key": "other"}, True),
        ({}, {"min_pass_rate": 0.9}, True),
    ],
)
def test_slices_of_a_file_are_trained_on_and_held_out_only_where_they_do_not_meet(
    make: Make, files: Path, train: dict[str, Any], held_out: dict[str, Any], is_refused: bool
) -> None:
    config = make({
        **sources(files), "data.evals.aime.path": str(files / "math.jsonl"),
        **{f"data.sources.math.{key}": value for key, value in train.items()},
        **{f"data.evals.aime.{key}": value for key, value in held_out.items()},
    })  # fmt: skip
    if is_refused:
        with pytest.raises(ConfigError, match=r"data\.evals\.aime must differ from data\.sources\.math"):
            validate(config, "train")
    else:
        validate(config, "train")


OWN_CODE = {"data.evals.aime.reward": "remote", "reward.url": "http://a:1"}
PASS_AT = {"eval.samples": 4, "eval.pass_at": (4,)}


def test_pass_at_is_refused_where_no_set_has_verdicts(make: Make, files: Path) -> None:
    validate(make({**sources(files), **PASS_AT}), "train")
    with pytest.raises(
        ConfigError, match=r"eval\.pass_at=4 must go with a set of data\.evals whose rewards are verdicts"
    ):
        validate(make({**sources(files), **OWN_CODE, **PASS_AT}), "train")
    validate(make({**sources(files), **OWN_CODE, **PASS_AT, "data.evals.aime.verdicts": True}), "train")
    validate(make({**sources(files), **OWN_CODE, **PASS_AT, "data.evals.x.path": str(files / "rows.parquet"),
                   "data.evals.x.kind": "parquet"}), "train")  # fmt: skip
    validate(make({**sources(files), **PASS_AT, "eval.interval": 0}), "train")  # nothing is evaluated for now


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sources.math.verdicts": True}, "data.sources.math.verdicts=true has no meaning: only data.evals"),
        (
            {"data.evals.aime.verdicts": True},
            "data.evals.aime.verdicts=true has no meaning: rewards of kind math_answer",
        ),
        (
            {"data.evals.aime.verdicts": True, "data.evals.aime.reward": "model"},
            "data.evals.aime.verdicts=true must go with a reward of kind function or remote, not model",
        ),
    ],
)
def test_verdicts_are_promised_only_where_that_acts(
    make: Make, files: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make({**sources(files), **changes}), "train")
    assert str(caught.value).startswith(message)


def test_a_parquet_file_that_is_read_as_lines_is_told(make: Make, files: Path) -> None:
    (files / "math.jsonl").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(ConfigError, match=r"math\.jsonl is a parquet file; set data\.sources\.math\.kind=parquet"):
        validate(make(sources(files)), "train")
