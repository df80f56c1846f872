"""The words of a command line: configuration files, overrides, and the command's own options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rpp.config.errors import ConfigError


class HelpAsked(Exception):
    """Its text is the answer to --help; cli.main prints it."""


@dataclass(frozen=True)
class Words:
    """What `load_config` reads, and what the command reads itself."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    options: Mapping[str, str]
    """By name; a later one wins. A flag's value is empty, and so is that of an option without one."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Files and overrides, as another command can be given them."""
        return (*self.files, *self.overrides)

    def filled(self, option: str) -> str | None:
        """An option's value; None where it was not given. Raises ConfigError for an empty one."""
        if self.options.get(option) == "":
            raise ConfigError(f"{option} must be followed by its value")
        return self.options.get(option)


def answer_help(words: Sequence[str], usage: str) -> None:
    """Raises HelpAsked where it is among `words`."""
    if "--help" in words or "-h" in words:
        raise HelpAsked(usage if usage.endswith("\n") else usage + "\n")


def split(words: Sequence[str], usage: str, options: Sequence[str] = (), flags: Sequence[str] = ()) -> Words:
    """`words` behind the command's name.

    Args:
        usage: the text for --help; its first line shows the command.
        options: are followed by a value, `--name VALUE` or `--name=VALUE`.
        flags: whole words. Whatever else begins with - is an override, and load_config's to judge.

    Raises:
        HelpAsked: see answer_help.
        ConfigError: there is no configuration file.
    """
    answer_help(words, usage)
    files: list[str] = []
    overrides: list[str] = []
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in options:
            found[name] = value if equals else next(rest, "")
        elif word in flags:
            found[word] = ""
        else:
            (overrides if word.startswith("-") else files).append(word)
    if not files:
        raise ConfigError(f"no configuration file; write: {usage.partition(chr(10))[0]}")
    return Words(tuple(files), tuple(overrides), found)
