"""Which ids end a response, and which one pads: the rules that every kind of tokenizer shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

Render = Callable[[list[dict[str, str]]], str]  # a conversation to text, by the chat template

_ANSWER = "ANSWER7391"  # stands for what the assistant says: no template trims or rewrites it
_CONVERSATION = (("user", "question"), ("assistant", _ANSWER), ("user", "again"))


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no such file. ValueError where it holds something else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object: it holds {type(value).__name__}")
    return value


def configured_ids(path: Path, key: str) -> tuple[int, ...]:
    """`key` of generation_config.json, else of config.json, else nothing; -1 stands for no token."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(path / name).get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"{path / name}: {key} is {value!r}; write a token id or a list of them")
        if found := tuple(i for i in ids if i >= 0):
            return found
    return ()


def end_ids(path: Path, own: int | None, turn_end: int | None) -> tuple[int, ...]:
    """Every id that ends a response.

    Args:
        path: its generation_config.json says, else its config.json, else `own`.
        own: the tokenizer's end of sequence.
        turn_end: what the chat template puts after an assistant's turn. It comes first, even where the files
            know other ids only: a chat model stops there, and a demonstration must teach it to.

    Raises:
        ValueError: there is none.
    """
    ids = configured_ids(path, "eos_token_id") or (() if own is None or own < 0 else (own,))
    if turn_end is not None:
        ids = (turn_end, *(i for i in ids if i != turn_end))
    if not ids:
        raise ValueError(
            f"{path}: no end-of-sequence token is known, so no response could ever stop; "
            "set eos_token_id in generation_config.json"
        )
    return ids


def turn_end_token(render: Render, special: Collection[str], never: Collection[str] = ()) -> str | None:
    """The special token that the chat template puts right after what the assistant says.

    Found by rendering, since names differ: <|im_end|>, <|eot_id|>, <end_of_turn>, </s>. A template that marks
    only beginnings (GLM) ends a turn with the next one's <|user|>, so a further turn is rendered if need be.
    That order matters: gpt-oss closes its last answer with <|return|> and earlier ones with another token.

    Args:
        render: raises or answers; a template that refuses the conversation has no known end.
        special: all special tokens.
        never: those that begin a text.
    """
    names = sorted(set(special) - set(never) - {""}, key=len, reverse=True)
    for length in (2, 3):
        turns = [{"role": role, "content": content} for role, content in _CONVERSATION[:length]]
        try:
            _, found, after = render(turns).rpartition(_ANSWER)
        except Exception:  # a template is a program of the model's author and may raise anything
            return None
        after = after.lstrip()
        if found and (token := next((name for name in names if after.startswith(name)), None)):
            return token
    return None


def pad_id(path: Path, own: int | None, special: Mapping[str, int], unknown: int | None, ends: tuple[int, ...]) -> int:
    """The tokenizer's padding, else config.json's, else a reserved token, else the unknown one, else an end.

    Any id below vocab_size gives the same loss: padding stands on the right of causal attention, so no
    real token sees it, and a mask made from lengths, never from ids, keeps it out of every sum. An id
    that no text uses is preferred because it can be told apart when a batch is printed.
    """
    if own is not None and own >= 0:
        return own
    if configured := configured_ids(path, "pad_token_id"):
        return configured[0]
    for word in ("pad", "reserved"):
        if named := [i for name, i in special.items() if word in name.lower()]:
            return min(named)
    return unknown if unknown is not None and unknown >= 0 else ends[0]
