"""Takes a normalized answer apart: lists, brackets, names of unknowns, units, letters of choices, words."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OPENING, _CLOSING = "([{", ")]}"
_NAME = re.compile(
    r"(?:[A-Za-z](?:_(?:\w|\{\w+\}))?'?|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)|[A-Z]{2}|[A-Za-z ]{3,}"
    r"|[A-Za-z]{1,2}\([^()=]{1,20}\)|\([A-Za-z](?:,\s*[A-Za-z])+\))"
)
_MEMBER = re.compile(r"[A-Za-z]\s*\\in\b\s*")
_EQUALS = re.compile(r"(?<![<>!\\:])=|\\approx\b")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)\b")
_CHOICE = re.compile(r"(?:\(([A-Ha-h])\)|([A-H])[.:)](?=\s|$)|([A-Ha-h])$)\s*(.{0,60})")
_WORD_CHARS = re.compile(r"[A-Za-z][A-Za-z '\-]*")
_UNIT_TAIL = re.compile(r"(?:(?<=[\d})])|(?<=\\pi)) ?([A-Za-z][A-Za-z/ .]*)(?:\s*\^\s*\{?([23])\}?)?$")
_QUANTITY = re.compile(
    r"-?(?:[\d., /]|\\frac\{[\d.]+\}\{[\d.]+\}|\\sqrt\{\d+\}|\\pi\b|\\cdot\b|\\times(?![a-z])|\^\{-?\d+\}|[(+)])+"
)
_CURRENCY = re.compile(r"(-?)\s*(?:\\\$|([\u20ac\u00a3\u00a5\u20b9]))\s*(.+)")
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?(\d{1,2})\}?")
_PERCENT = re.compile(r"(.+?)\s*(?:\\?%|percentage|percent|pct)")
_DEGREES = re.compile(r"(-?[\d./]+|-?\\frac\{\d+\}\{\d+\})\s*\^\\circ")


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
    if not _is_balanced(inner):
        return None
    items = tuple(item.strip() for item in _split(inner, ",;")) if inner.strip() else ()
    return Bracketed(opening, items, closing) if is_set or len(items) > 1 else None


def named(text: str) -> tuple[str, str]:
    """(name, value) of `x = 5`, `f(x) = y = 5` and `x in S`; ("", text) for what is no assignment."""
    if (member := _MEMBER.match(text)) is not None:
        return text[0], text[member.end() :].strip()
    parts = [part.strip() for part in _EQUALS.split(text)]
    if len(parts) < 2 or _RELATION.search(text) or not all(parts):
        return "", text
    is_sum = len(parts) == 2 and not re.search(r"[A-Za-z]", parts[0])
    if _NAME.fullmatch(parts[0]) or is_sum:
        return ("" if is_sum else parts[0]), parts[-1]
    return "", text


def is_relation(text: str) -> bool:
    """Whether it is an equation or an inequality."""
    return bool(_EQUALS.search(text) or _RELATION.search(text))


def choice(text: str) -> tuple[str, str]:
    """(letter, what it stands for) of `C`, `(C)`, `C. 5`; ("", "") for anything else."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return "", ""
    return (match[1] or match[2] or match[3]).upper(), match[4].strip()


def words(text: str) -> str:
    """The answer as lower-case words, where it is nothing else; else ""."""
    text = text.rstrip("!?. ")
    if not _WORD_CHARS.fullmatch(text) or len(text) < 2:
        return ""
    plain = " ".join(text.lower().split())
    return _SYNONYMS.get(plain, plain)


def value_and_unit(text: str) -> tuple[str, str]:
    """`5 cm^2` -> ("5", "cm^2"); ("5", "") where there is none. `5m` is 5 times m, `5 m` is 5 metres."""
    if (match := _CURRENCY.fullmatch(text)) is not None:
        return match[1] + match[3], match[2] or "dollar"
    if (match := _PERCENT.fullmatch(text)) is not None:
        return match[1], "%"
    if (match := _DEGREES.fullmatch(text)) is not None:
        return match[1], "degree"
    match = _UNIT_TAIL.search(text)
    if match is None or not _QUANTITY.fullmatch(text[: match.start()]) or not _may_be_unit(match[1], match[0]):
        return text, ""
    return text[: match.start()].strip(), _unit(match[1], match[2] or "")


def _may_be_unit(name: str, tail: str) -> bool:
    """Not a variable: a letter or two only where they are a unit's and stand apart."""
    return len(name) > 3 or (name.lower() in _SHORT_UNITS and (tail.startswith(" ") or len(name) > 1))


def digits_and_base(text: str) -> tuple[str, str]:
    """`1011_2` -> ("1011", "2"); (text, "") where no base is given."""
    match = _BASE.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def _unit(name: str, power: str) -> str:
    parts = name.lower().rstrip(". ").split()
    while parts and parts[0] in _POWERS:
        power = _POWERS[parts.pop(0)]
    name = " ".join(parts)
    singular = name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name
    name = _UNITS.get(name) or _UNITS.get(singular, singular)
    return f"{name}^{power}" if power else name


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


def _is_balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth < 0:
            return False
    return depth == 0


_SHORT_UNITS = frozenset((
    *"mgshlnjwvkcf", "cm", "mm", "km", "nm", "dm", "ft", "in", "yd", "mi", "kg", "mg", "lb", "oz", "ml", "kl", "hz",
    "kw", "hr", "pt", "qt", "sec", "min", "day", "mph", "kmh", "cup", "gal", "psi", "deg", "rad", "m/s", "km/h",
))  # fmt: skip
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "mph": "mi/h", "miles per hour": "mi/h",
    "dollar": "dollar", "degree": "degree", "unit": "unit",
}  # fmt: skip
_SYNONYMS = {
    "no solutions": "no solution", "no real solution": "no solution", "no real solutions": "no solution",
    "none": "no solution", "no such": "no solution", "does not exist": "dne", "doesn't exist": "dne",
}  # fmt: skip
