"""rollout.urls_file: the URL of a server on each line; # starts a comment."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.urls import is_url

logger = logging.getLogger(__name__)


class UrlsFile:
    """Reads the file again and again; replace it by a rename, so that no half of it is read."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError for a file that cannot be read or holds a line that is no URL."""
        self._path = Path(path)
        try:
            self._urls, wrong = parse_urls(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"rollout.urls_file={path} cannot be read: {error}") from error
        if wrong:
            raise ConfigError(f"rollout.urls_file={path}: {wrong[0]}")
        self._warned: set[str] = set()

    def urls(self) -> tuple[str, ...]:
        """The URLs it names now. What is wrong with it is warned of once; an unreadable file changes nothing."""
        try:
            self._urls, wrong = parse_urls(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            wrong = [f"cannot be read, the servers stay as they are: {error}"]
        for complaint in wrong:
            if complaint not in self._warned:
                logger.warning("rollout.urls_file=%s: %s", self._path, complaint)
        self._warned = set(wrong)  # one that comes back after it was mended is warned of again
        return self._urls


def parse_urls(text: str) -> tuple[tuple[str, ...], list[str]]:
    """(URLs in order, each once and without a slash at its end; a complaint for each line that is no URL)."""
    urls: list[str] = []
    complaints: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        url = line.partition("#")[0].strip().rstrip("/")
        if url and not is_url(url):
            complaints.append(f"line {number}: {url!r} must be a URL such as http://host:30000; mend or remove it")
        elif url and url not in urls:
            urls.append(url)
    return tuple(urls), complaints
