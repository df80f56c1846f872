"""Takes a normalized answer apart: lists, brackets, letters of choices, words."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OPENING, _CLOSING = "([{", ")]}"
_CHOICE = re.compile(
    r"(?:[Oo]ption |[Cc]hoice |[Aa]nswer )?(?:\(([A-Ha-h])\)|([A-H])[.:)](?=\s|$)|([A-Ha-h])$)\s*(.{0,60})"
)
_BOTH = re.compile(r"(?:[Bb]oth|[Ee]ither) (?=.* (?:and|or) )")
_ARTICLE = re.compile(r"(?:an?|the) (?=[A-Za-z]{2})")
_LETTERS = re.compile(r"[A-H]{2,8}")
_BUILDER = re.compile(r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]\s*(.*)\\\}")
_INTEGER = re.compile(
    r"(?<=.)[\s,;(]+(?:(?:where|for|with) )?(?:(?:all|any|every|integers?) )*[a-z]\s*\\in\s*\\mathbb\{[ZN]\}\s*\)?$"
)
_WORD_CHARS = re.compile(r"[A-Za-z][A-Za-z '\-]*")


@dataclass(frozen=True)
class Bracketed:
    """`opening` items `closing`: a tuple, an interval, a set."""

    opening: str
    items: tuple[str, ...]
    closing: str


def split_list(text: str) -> list[str]:
    """The parts between commas, semicolons, `and` and `or` that stand outside of brackets."""
    return [part for piece in _split(text, ",;") for part in _split_joined(piece)]


def bracketed(text: str) -> Bracketed | None:
    r"""`(1,2]` and `\{1\}` in their parts; None for anything else, as for a number in parentheses."""
    is_set = text.startswith("\\{") and text.endswith("\\}")
    inner = text[2:-2] if is_set else text[1:-1]
    opening, closing = ("{", "}") if is_set else (text[:1], text[-1:])
    if not is_set and (opening not in ("(", "[") or closing not in (")", "]")):
        return None
    if not is_balanced(inner):
        return None
    items = tuple(item.strip() for item in _split(inner, ",;")) if inner.strip() else ()
    return Bracketed(opening, items, closing) if is_set or len(items) > 1 else None


def choice(text: str) -> tuple[str, str]:
    """(letter, what it stands for) of `C`, `(C)`, `C. 5`; ("", "") for anything else."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return "", ""
    return (match[1] or match[2] or match[3]).upper(), match[4].strip()


def letters(text: str) -> str:
    """`AC` of the choices `A, C`, `C and A`, `AC` or `CA`, in the order of the alphabet; "" for anything else."""
    parts = split_list(text)
    found = "".join(sorted((choice(part)[0] for part in parts) if len(parts) > 1 else text))
    is_list = len(parts) < 2 or len(found) == len(parts)
    return found if is_list and _LETTERS.fullmatch(found) and len(set(found)) == len(found) else ""


def without_conditions(text: str) -> str:
    r"""`x>2` of `\{x|x>2\}`, `x=k\pi` of `x=k\pi, k\in\mathbb{Z}`, and a symbol for `all real numbers`."""
    if words(text) in _REALS:
        return r"\mathbb{R}"
    text = _INTEGER.sub("", _BOTH.sub("", text, count=1))
    builder = _BUILDER.fullmatch(text)
    return builder[1].strip() if builder is not None else text


def words(text: str) -> str:
    """The answer as lower-case words, where it is nothing else; else ""."""
    text = text.rstrip("!?. ")
    if not _WORD_CHARS.fullmatch(text) or len(text) < 2:
        return ""
    plain = " ".join(text.lower().split())
    plain = _ARTICLE.sub("", plain, count=1) if _ARTICLE.match(plain) else plain
    return _SYNONYMS.get(plain, plain)


def _split(text: str, separators: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth <= 0 and char in separators:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _split_joined(text: str) -> list[str]:
    return [part for part in (piece.strip() for piece in re.split(r"(?:^|\s+)(?:and|or)\s+", text)) if part]


def is_balanced(text: str) -> bool:
    """Whether every bracket is closed; a round one by a square one, too, as in `(1,2]`."""
    depth = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth < 0:
            return False
    return depth == 0


_REALS = frozenset(("all real numbers", "all reals", "real numbers", "all real"))
_SYNONYMS = {
    "no solutions": "no solution", "no real solution": "no solution", "no real solutions": "no solution",
    "none": "no solution", "no such": "no solution", "does not exist": "dne", "doesn't exist": "dne",
}  # fmt: skip
