r"""What a normalized answer calls its value: `x = 5`, `x \in S`, `m + n = 17`, `A(1,2)`; chains such as `1 < x < 2`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rpp.reward.math.answer_parts import Bracketed, bracketed, is_balanced

UNKNOWN = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|"
    r"phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)(?![A-Za-z]))"
)
_NAME = re.compile(
    rf"(?:{UNKNOWN}(?:_(?:\w|\{{\\?\w+\}}))?(?:'|\^\*)?|[A-Z]{{2}}|[A-Za-z ]{{3,}}"
    r"|[A-Za-z]{1,2}'?(?:\^\{-1\})?\([^()=]{1,20}\)|\([A-Za-z](?:,\s*[A-Za-z])+\))"
)
_MEMBER = re.compile(r"([A-Za-z]|\([A-Za-z](?:,\s*[A-Za-z])+\))\s*\\in(?![A-Za-z])\s*")
_POINT = re.compile(r"([A-Z])\s*(\(.+,.+\))")
_EQUALS = re.compile(r"(?<![<>!\\:])=")
_OPERATOR = re.compile(r"(<|>|\\(?:le|ge|ne)(?![A-Za-z]))")
_APPROX = re.compile(r"\\approx(?![A-Za-z])")
_CONGRUENT = re.compile(r"\s*\\equiv(?![A-Za-z])\s*")
_FUNCTIONS = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pi|binom|log|ln|sin|cos|tan|circ)(?![A-Za-z])")
_LETTER = re.compile(r"[A-Za-z]")
_ASIDE = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|_\{[^{}]*\}|_\w|\^\{-1\}")
_FLIPPED = {">": "<", r"\ge": r"\le"}


def named(text: str) -> tuple[str, str]:
    """(name, value) of `x = 5`, `f(x) = y = 5` and `x in S`; ("", text) for what is no assignment."""
    if (member := _MEMBER.match(text)) is not None:
        return member[1], text[member.end() :].strip()
    if (point := _POINT.fullmatch(text)) is not None and bracketed(point[2]) is not None:
        return point[1], point[2]
    text = _exact(text)
    parts = _CONGRUENT.split(text) if r"\pmod" in text else sides(text)
    if len(parts) < 2 or _OPERATOR.search(text) or not all(parts):
        return "", text
    if _NAME.fullmatch(parts[0]):
        return parts[0], parts[-1]
    if any(map(_has_letter, parts[:-1])):
        return "", text
    if len(parts) == 2 and re.fullmatch(UNKNOWN, parts[1]):
        return parts[1], parts[0]  # 5 = x
    return "", parts[-1]


def stated_value(text: str) -> str:
    r"""The value in `m + n = 17` or `\cos A = \frac12`: of what has a name without a number in it; else ""."""
    parts = sides(_exact(text))
    name = _ASIDE.sub("", parts[0])
    is_name = _LETTER.search(name) and not re.search(r"\d", name) and not _OPERATOR.search(text)
    return parts[-1] if is_name and len(parts) > 1 else ""


def rounded_value(text: str) -> tuple[str, str]:
    r"""(exact, rounded) of `5\sqrt{2}\approx 7.07`; two empty texts for anything else."""
    parts = _APPROX.split(text)
    return (_exact(text), parts[1].strip()) if len(parts) == 2 and parts[0].strip() else ("", "")


def is_relation(text: str) -> bool:
    """Whether it is an equation or an inequality."""
    return bool(_EQUALS.search(text) or _OPERATOR.search(text) or _APPROX.search(text))


def sides(text: str) -> list[str]:
    """What stands between the equality signs that no bracket holds."""
    parts, start = [], 0
    for match in _EQUALS.finditer(text):
        if is_balanced(text[start : match.start()]):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def chain(text: str) -> tuple[list[str], list[str]]:
    """(operators, what stands between them) of `a > b > c`, turned so that the smallest comes first."""
    pieces = [piece.strip() for piece in _OPERATOR.split(text)]
    operators, values = pieces[1::2], pieces[::2]
    if operators and all(operator in _FLIPPED for operator in operators):
        return [_FLIPPED[operator] for operator in reversed(operators)], values[::-1]
    return operators, values


def each_named(part: str) -> list[str]:
    """`a = b = 1` as `a = 1` and `b = 1`; anything else as it is."""
    parts = sides(part)
    if len(parts) < 3 or not all(re.fullmatch(UNKNOWN, name) for name in parts[:-1]):
        return [part]
    return [f"{name}={parts[-1]}" for name in parts[:-1]]


def as_point(parts: Sequence[str]) -> Bracketed | None:
    """`x = 1`, `y = 2` as (1,2), in the order of the alphabet; None for other lists."""
    values = dict(map(named, parts))
    is_point = len(parts) > 1 and len(values) == len(parts) and all(len(name) == 1 for name in values)
    return Bracketed("(", tuple(values[name] for name in sorted(values)), ")") if is_point else None


def _exact(text: str) -> str:
    r"""`5\sqrt{2}` of `5\sqrt{2}\approx 7.07`; `x = 5` for `x \approx 5`."""
    parts = [part.strip() for part in _APPROX.split(text)]
    if len(parts) == 1 or not parts[0]:
        return parts[-1]
    return f"{parts[0]}={parts[1]}" if _NAME.fullmatch(parts[0]) else parts[0]


def _has_letter(text: str) -> bool:
    return bool(_LETTER.search(_FUNCTIONS.sub("", text)))
