"""What a record asks: its text or conversation, by the template of its source. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.config.templates import DEFAULT, template_names
from megatron_rpp.data.chat import as_text, conversation
from megatron_rpp.data.jsonl import list_names


def template_of(source: SourceConfig, data: DataConfig) -> tuple[str, str]:
    """(what a message calls it, the template) of a source's prompts: its own, or data.prompt_template."""
    if source.prompt_template:
        return "the source's prompt_template", source.prompt_template
    return DEFAULT, data.prompt_template


def ask(
    source: SourceConfig, data: DataConfig, fields: Mapping[str, Any], where: str
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """(text, turns): what the source's template makes of a record. A text alone has no turns.

    Raises:
        ValueError: a key that is not there, a malformed template, a conversation without data.chat_template.
    """
    key, template = template_of(source, data)
    names = template_names(template, key)
    if null := next((name for name in names if name in fields and fields[name] is None), None):
        raise ValueError(f"{where}: `{null}`, which {key} names, is null; give it a text")
    name = next((name for name in names if _is_conversation(fields.get(name))), None)
    if name is None:
        return format_prompt(key, template, fields, where), ()
    if not data.chat_template:
        raise ValueError(f"{where}: `{name}` is a conversation; set data.chat_template=true, or name a key with text")
    *before, last = conversation(fields[name], where)
    last["content"] = format_prompt(key, template, {**fields, name: last["content"]}, where)
    turns = (*before, last)
    return as_text(turns), turns


def _is_conversation(value: Any) -> bool:
    """A list of tables; other lists, such as a question's choices, are text."""
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def format_prompt(key: str, template: str, fields: Mapping[str, Any], where: str) -> str:
    """`template` with the names in braces replaced from `fields`. `key` is what a message calls it."""
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise ValueError(
            f"{where}: {key} names `{error.args[0]}`, which is not there; available: {list_names(list(fields))}"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{key}={template!r} is not a valid template ({error}); "
            "write a key as {prompt} and a literal brace as {{ or }}"
        ) from None
