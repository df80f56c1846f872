"""Templates: what they name, and backslashes that TOML has eaten."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.config.templates import check_template, template_names, template_paths
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]


def test_names_are_split_into_their_parts() -> None:
    template = "{a} {b[c][d]} {e.f:>3} {{g}}"
    assert template_paths(template) == [("a",), ("b", "c", "d"), ("e", "f")]
    assert template_names(template) == ["a", "b", "e"]


@pytest.mark.parametrize(
    ("toml", "written"),
    [
        (r'"{prompt} in \boxed{{}}."', r"\\boxed"),
        (r'"{prompt} as \frac{{1}}{{2}}"', r"\\frac"),
        (r'"{prompt} as \right"', r"\\right"),
        (r'"{prompt} in \text{{m}}"', r"\\text"),
    ],
)
def test_a_backslash_that_toml_has_eaten_is_named(toml: str, written: str) -> None:
    template = tomllib.loads(f"t = {toml}")["t"]
    with pytest.raises(ConfigError) as caught:
        check_template("data.prompt_template", template)
    assert f"write {written} there, or use '...'" in str(caught.value)


@pytest.mark.parametrize("toml", [r'"{prompt}\n\t- in \\boxed{{}}"', r"'{prompt} in \boxed{{}}'", r'"a\tb\u0000{x}"'])
def test_line_ends_tabs_and_whole_backslashes_pass(toml: str) -> None:
    template = tomllib.loads(f"t = {toml}")["t"]
    if "\0" not in template:
        check_template("data.prompt_template", template)
        return
    with pytest.raises(ConfigError, match=r"that \\t stands for"):
        check_template("data.prompt_template", template)
    with pytest.raises(ConfigError, match=r"control character U\+0000; leave it out"):
        check_template("data.prompt_template", template.replace("\t", " "))


@pytest.mark.parametrize("section", ["data", "data.train"])
def test_every_template_of_a_run_is_checked(make: Make, tmp_path: Path, section: str) -> None:
    key = f"{section}.prompt_template"
    for text, problem in {"{prompt} \boxed": "holds the control character", "say": "must name a key in braces"}.items():
        with pytest.raises(ConfigError) as caught:
            validate(make({key: text}), "train")
        assert str(caught.value) == f"{key}={text!r} {problem}" or str(caught.value).startswith(
            f"{key}={text!r} {problem}"
        )


def test_sources_with_templates_of_their_own_can_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[data.sources.a]\nprompt_template = '{problem}'\n")
    named: dict[str, Any] = dict(load_config([str(tmp_path / "a.toml")], []).data.sources)
    assert named["a"].prompt_template == "{problem}"
