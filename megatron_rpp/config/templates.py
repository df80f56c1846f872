"""Texts with names in braces, as a TOML file or the command line gives them. Imports no torch."""

from __future__ import annotations

import re
import string

from megatron_rpp.config.data import DataConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.toml_text import written

DEFAULT = "data.prompt_template"
_ESCAPES = {"\b": "\\b", "\f": "\\f", "\r": "\\r", "\t": "\\t"}  # what TOML makes of \boxed, \frac, \right, \text

_OF_THE_TRAINER = (  # what it sets itself, or what would change the kind of the result
    "messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)  # fmt: skip


def check_chat_template_args(data: DataConfig) -> None:
    """data.chat_template_args go with a chat template, and do not touch the conversation. Raises ConfigError."""
    if data.chat_template_args and not data.chat_template:
        found = f"data.chat_template_args={written(data.chat_template_args)}"
        raise ConfigError(f"{found} must go with data.chat_template=true; else it does nothing")
    for name in data.chat_template_args:
        if name in _OF_THE_TRAINER:
            raise ConfigError(f"data.chat_template_args.{name} is set by the trainer; leave it out")


def check_template(key: str, template: str) -> None:
    """Raises ConfigError for a template that is malformed, names no key, or lost backslashes to TOML."""
    check_control_characters(key, template)
    template_paths(template, key)


def template_names(template: str, key: str = DEFAULT) -> list[str]:
    """The keys in braces; of {extra_info[question]}, extra_info. Raises ConfigError as `template_paths`."""
    return [path[0] for path in template_paths(template, key)]


def template_paths(template: str, key: str = DEFAULT) -> list[tuple[str, ...]]:
    """The names in braces, part by part: ("extra_info", "question") of {extra_info[question]}.

    Raises:
        ConfigError: it is malformed, or names no key.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{key}={template!r} must be a valid template: {error}") from error
    paths = [tuple(re.split(r"[.\[]", field.replace("]", ""))) for field in fields]
    if not paths or any(path[0] == "" for path in paths):
        raise ConfigError(f"{key}={template!r} must name a key in braces, such as {{prompt}}")
    return paths


def check_control_characters(key: str, text: str) -> None:
    """In TOML's double quotes \\boxed begins with a backspace, and \\text with a tab. Raises ConfigError."""
    found = re.search(r"([\x00-\x08\x0b-\x1f\x7f]|\t(?=[A-Za-z]))([A-Za-z]*)", text)
    if found is None:
        return
    character, word = found.groups()
    if character not in _ESCAPES:
        raise ConfigError(f"{key}={text!r} holds the control character U+{ord(character):04X}; leave it out")
    escape = _ESCAPES[character] + word
    raise ConfigError(
        f"{key}={text!r} holds the control character that {escape[:2]} stands for in double quotes; "
        f"write \\{escape} there, or use '...'"
    )
