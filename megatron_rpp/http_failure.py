"""What a server says when it does not do what was asked."""

from __future__ import annotations

import json
from typing import Any

_MAX_MESSAGE = 2000


class HttpFailure(Exception):
    """A reply that is not 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status

    @property
    def is_transient(self) -> bool:
        """Sending it again may help: the server failed or is busy, and the request is not wrong."""
        return self.status >= 500 or self.status in (408, 429)


def reply_message(body: str) -> str:
    """The message in an error body of SGLang, or the body itself."""
    try:
        reply: Any = json.loads(body)
    except ValueError:
        return body[:_MAX_MESSAGE]
    if isinstance(reply, dict):
        error = reply.get("error")
        reply = (error.get("message") if isinstance(error, dict) else error) or reply.get("message") or reply
    return str(reply)[:_MAX_MESSAGE]
