"""Conversations of data sets. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.experience.chat import Chat, Turn


def plain_texts(prompts: Sequence[Chat]) -> list[str]:
    """`prompts`, which must all be texts: a conversation needs a chat template (read_problems sees to it)."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    assert len(texts) == len(prompts), "a conversation is rendered by a chat template"
    return texts


def conversation(value: Sequence[Any], where: str) -> tuple[dict[str, Any], ...]:
    """The turns in a list of a data set, which must leave the next one to the assistant.

    Raises:
        ValueError: it is empty or ends with the assistant; a turn is no object, or lacks a role or text.
    """
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: turn {number} of the conversation needs a `role` and a `content`, both text")
        turns.append({key: part for key, part in turn.items() if part is not None})  # tables fill up with nulls
    if not turns:
        raise ValueError(f"{where}: the conversation is empty; give at least one turn")
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the conversation ends with the assistant's turn; end it with the user's")
    return tuple(turns)


def check_template_args(args: Mapping[str, Any], template: object, path: Path) -> None:
    """The chat template of the tokenizer at `path` reads each of data.chat_template_args. Raises ValueError."""
    for name in args:
        if not template:
            raise ValueError(f"{path}: this tokenizer has no chat template; leave data.chat_template_args empty")
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(template)):
            raise ValueError(
                f"data.chat_template_args: the chat template of {path} does not read `{name}`; correct the name or "
                "leave it out"
            )


def as_text(turns: Sequence[Turn]) -> str:
    """A conversation for people to read; of a user's only turn, its text."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
