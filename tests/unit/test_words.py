"""How every command reads its words."""

from __future__ import annotations

import pytest

from megatron_rpp.commands.words import HelpAsked, split
from megatron_rpp.config.errors import ConfigError

USAGE = "rpp walk CONFIG.toml [--to PLACE]\n\nWalks.\n"


def test_files_overrides_and_options_are_told_apart_in_any_order() -> None:
    words = ["--to", "here", "a.toml", "--run.dir=/r", "--fast", "b.toml", "--to=a=b", "--from"]
    found = split(words, USAGE, options=("--to", "--from"), flags=("--fast",))
    assert (found.files, found.overrides) == (("a.toml", "b.toml"), ("--run.dir=/r",))
    assert found.options == {"--to": "a=b", "--fast": "", "--from": ""}
    assert found.settings == ("a.toml", "b.toml", "--run.dir=/r")


def test_a_flag_with_a_value_and_a_misspelt_option_are_left_to_whoever_reads_settings() -> None:
    found = split(["a.toml", "--fast=yes", "--too=here"], USAGE, options=("--to",), flags=("--fast",))
    assert found.overrides == ("--fast=yes", "--too=here") and not found.options


def test_an_option_that_must_have_a_value_is_asked_for_it() -> None:
    found = split(["a.toml", "--to"], USAGE, options=("--to", "--from"))
    assert found.filled("--from") is None
    with pytest.raises(ConfigError, match="--to must be followed by its value"):
        found.filled("--to")


def test_help_comes_before_complaints() -> None:
    with pytest.raises(HelpAsked, match="Walks"):
        split(["--help"], USAGE)
    with pytest.raises(ConfigError, match=r"no configuration file; write: rpp walk CONFIG.toml \[--to PLACE\]$"):
        split(["--run.dir=/r"], USAGE)
