"""What is a server's URL; imports no torch."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_url(url: str) -> bool:
    """http or https, with a host, and a port that can be one."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port is above 65535
        return False
    return is_whole and not any(c.isspace() for c in url)
