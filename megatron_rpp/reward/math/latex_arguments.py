r"""Braces around the arguments of commands, as TeX reads them: `\frac\pi2` is `\frac{\pi}{2}`. Text in, text out."""

from __future__ import annotations

import re

_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1, "overline": 1, "dot": 1, "mathbb": 1}
_COMMAND = re.compile(r"\\(" + "|".join(_ARGUMENTS) + r")(?![A-Za-z])\s*(\[[^\[\]]*\])?")
_NAME = re.compile(r"\\[A-Za-z]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PAIRS = {"{": "}", "(": ")"}
_GLUED = re.compile(r"(\\[A-Za-z]+)(?=\d)")


def brace_arguments(text: str) -> str:
    r"""Every argument in braces and a space between a command and a digit: `\sqrt3`, `\frac{a}b`, `x\le2`."""
    for match in reversed(list(_COMMAND.finditer(text))):  # from the right, so that inner ones come first
        end, arguments = match.end(), list[str]()
        for _ in range(_ARGUMENTS[match[1]]):
            content, end = _argument(text, end, is_root=match[1] == "sqrt")
            arguments.append(content)
        if not all(arguments) or (_is_digits(arguments) and text[end : end + 1].isdigit()):
            continue  # cut off, or \frac123, which nobody can tell
        degree = (match[2] or "") if match[1] == "sqrt" and match[2] != "[]" else ""
        braced = "".join(f"{{{content}}}" for content in arguments)
        text = rf"{text[: match.start()]}\{match[1]}{degree}{braced}{text[end:]}"
    return _GLUED.sub(r"\1 ", text)


def _is_digits(arguments: list[str]) -> bool:
    return len(arguments) == 2 and all(len(content) == 1 and content.isdigit() for content in arguments)


def _argument(text: str, begin: int, *, is_root: bool) -> tuple[str, int]:
    """(content, where it ends) of the argument at `begin`; ("", begin) where there is none. sqrt(8) is a root, too."""
    while text[begin : begin + 1].isspace():
        begin += 1
    first = text[begin : begin + 1]
    if first == "{" or (first == "(" and is_root):
        end = _closing(text, begin)
        return (text[begin + 1 : end].strip(), end + 1) if end else ("", begin)
    if first == "\\" and (name := _NAME.match(text, begin)) is not None:
        end = name.end()
        while name[0][1:] in _ARGUMENTS and text[end : end + 1] in ("{", "["):
            end = (_closing(text, end) if text[end] == "{" else text.find("]", end)) + 1 or len(text)
        return text[begin:end], end
    if is_root and (number := _NUMBER.match(text, begin)) is not None:
        return number[0], number.end()
    return (first, begin + 1) if first.isalnum() else ("", begin)


def _closing(text: str, begin: int) -> int:
    """Where the bracket at `begin` is closed; 0 where it is not."""
    opening, closing, depth = text[begin], _PAIRS[text[begin]], 0
    for i in range(begin, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    return 0
