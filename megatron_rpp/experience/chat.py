"""A user's text, or a conversation: what is asked of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]  # at least {"role": "user", "content": "1 + 1"}
Chat = str | Sequence[Turn]  # a user's text stands for a conversation of that turn alone


def turns_of(chat: Chat) -> list[dict[str, Any]]:
    """The conversation that `chat` is or stands for."""
    return [{"role": "user", "content": chat}] if isinstance(chat, str) else [dict(turn) for turn in chat]
