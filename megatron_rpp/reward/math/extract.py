"""Finds the final answer in a response. Plain text in, plain text out; linear in the text's length."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1000
"""A longer answer is no answer: it counts as wrong and is never parsed."""
MAX_DEPTH = 24
"""Nor is one with more brackets within one another: parsing it takes seconds."""
MAX_BARE_CHARS = 64

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_PLAIN_NUMBER = re.compile(r"([-+]?)(\d{1,100}|\d{1,3}(?:,\d{3}){1,30})(\.\d{1,100})?(?:/(\d{1,100}))?")
_LEADING_POINT = re.compile(r"^([-+]?)\.")
_ANSWER_IS = re.compile(r"\banswer(?: is\b|:)[\s:]*", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|log|ln|exp|sqrt|pi|mod|or)\b)[A-Za-z]{2,}")
_ONLY_ARITHMETIC = re.compile(r"[-+*/.,\s\d]*")
_UNEVALUATED = re.compile(r"\d\s*(?:[-+*\u00d7\u00b7\u00f7]|\\times|\\cdot|\\div)\s*[-{(]*\d")
_SCIENTIFIC = re.compile(r"(?:[*\u00d7\u00b7]|\\times|\\cdot)\s*\{?10\}?\s*\^")


def final_answer(text: str) -> str:
    r"""What \boxed{}, <answer>, `####` or "answer is" marks; else a bare answer, the last number, or ""."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    bare = clean(text)
    if _is_bare(bare):
        return bare
    return last_number(text) or (bare if len(bare) <= MAX_BARE_CHARS else "")


def marked_answer(text: str) -> str | None:
    r"""The answer that the response marks as such, or None."""
    for find in (boxed_answer, _tagged, _hashed, _answer_is):
        found = find(text)
        if found is not None and (found := clean(found)):
            return found
    return None


def last_number(text: str) -> str:
    """The last number in the text, or ""."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else ""


def clean(text: str) -> str:
    """`text` without what surrounds an answer: white space, dollar signs, asterisks, a full stop."""
    text = text.strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.strip(" \t\r\n$*`")
    shorter = text.rstrip(".,;")
    if shorter.endswith("\\"):
        shorter = text[: len(shorter) + 1]  # `\;` is a space
    return shorter.strip(" \t$*`")


def plain_number(text: str) -> Fraction | None:
    """The value of an integer, decimal or simple fraction (`-1,234.5`, `3/4`), exactly; else None."""
    match = _PLAIN_NUMBER.fullmatch(_LEADING_POINT.sub(r"\g<1>0.", text.strip()))
    if match is None:
        return None
    sign, whole, decimals, denominator = match.groups()
    if denominator is not None and (decimals is not None or int(denominator) == 0):
        return None
    value = Fraction(whole.replace(",", "") + (decimals or "")) / int(denominator or 1)
    return -value if sign == "-" else value


def depth(text: str) -> int:
    """Brackets within one another, closed or not."""
    open_now = deepest = 0
    for char in text:
        open_now += (char in "([{") - (char in ")]}")
        deepest = max(deepest, open_now)
    return deepest


def has_no_value(text: str) -> bool:
    """Whether text that is not a plain number cannot be one: `12 + 5` (work left to do), or no digit."""
    if "\\" not in text and (_ONLY_ARITHMETIC.fullmatch(text) or not any(c.isnumeric() for c in text)):
        return True
    return bool(_UNEVALUATED.search(text)) and not _SCIENTIFIC.search(text)


def _is_bare(text: str) -> bool:
    """An answer without a sentence around it: one short line with at most one word (a unit)."""
    return 0 < len(text) <= MAX_BARE_CHARS and "\n" not in text and len(_WORD.findall(text)) < 2


def boxed_answer(text: str) -> str | None:
    r"""What the last whole \boxed{} holds, or None."""
    end = len(text)
    for _ in range(3):  # the last may be cut off, as in a truncated response
        end = max(text.rfind(r"\boxed{", 0, end), text.rfind(r"\fbox{", 0, end))
        if end < 0:
            return None
        content = _until_closing_brace(text, text.index("{", end) + 1)
        if content is not None:
            return content
    return None


def _until_closing_brace(text: str, begin: int) -> str | None:
    depth = 1
    for i in range(begin, min(len(text), begin + MAX_ANSWER_CHARS + 1)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def _tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _hashed(text: str) -> str | None:
    start = text.rfind("####")
    return text[start + 4 :].lstrip(" \t").split("\n", 1)[0] if start >= 0 else None


def _answer_is(text: str) -> str | None:
    matches = list(_ANSWER_IS.finditer(text))
    if not matches:
        return None
    sentence = re.split(r"\n|\.\s", text[matches[-1].end() :], maxsplit=1)[0]
    if _is_bare(clean(sentence)):
        return sentence
    number = _NUMBER.search(sentence)
    return number.group() if number else sentence
