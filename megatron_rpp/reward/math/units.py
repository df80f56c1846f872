"""Units, percent signs, degrees, bases and moduli of a normalized answer."""

from __future__ import annotations

import re

_UNIT_TAIL = re.compile(r"(?:(?<=[\d})])|(?<=\\pi)) ?([A-Za-z][A-Za-z/ .]*)(?:\s*\^\s*\{?(-?[123])\}?)?$")
_QUANTITY = re.compile(r"-?(?:[\d., /:^+(){}-]|\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z]))+")
_CURRENCY = re.compile(r"(-?)\s*(?:\\\$|([\u20ac\u00a3\u00a5\u20b9]))\s*(.+)")
_BASE = re.compile(r"\(?(\w+)\)?\s*_\s*[{(]{0,2}(\d{1,2}|[a-z]{3,8})[)}]{0,2}")
_MODULUS = re.compile(r"(.+?)\s*\\pmod\s*\{(\w+)\}")
_TIME = re.compile(r"(\d{1,2}:\d\d)\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_PERCENT = re.compile(r"(.+?)\s*(?:\\?%|percentage|percent|pct)")
_DEGREES = re.compile(r"(-?[\d./]+|-?\\frac\{\d+\}\{\d+\})\s*\^\\circ\s*([CFK]?)")
_SYMBOLS = re.compile(r"\\(Omega|mu|AA)(?![A-Za-z])\s*([A-Za-z]{0,2})$")


def value_and_unit(text: str) -> tuple[str, str]:
    """`5 cm^2` -> ("5", "cm^2"); ("5", "") where there is none. `5m` is 5 times m, `5 m` is 5 metres."""
    if (match := _CURRENCY.fullmatch(text)) is not None:
        return match[1] + match[3], match[2] or "dollar"
    if (match := _PERCENT.fullmatch(text)) is not None:
        return match[1], "%"
    if (match := _DEGREES.fullmatch(text)) is not None:
        return match[1], f"degree {match[2]}".strip()
    if (match := _TIME.fullmatch(text)) is not None:
        return match[1], match[2].lower() + "m"
    if (match := _SYMBOLS.search(text)) is not None and _QUANTITY.fullmatch(text[: match.start()]):
        return text[: match.start()].strip(), match[0]
    match = _UNIT_TAIL.search(text)
    if match is None or not _QUANTITY.fullmatch(text[: match.start()]) or not _may_be_unit(match[1], match[0]):
        return text, ""
    return text[: match.start()].strip(), _unit(match[1], match[2] or "")


def _may_be_unit(name: str, tail: str) -> bool:
    """Not variables: those of the table, and other words where they stand apart; so does a letter alone."""
    name, is_apart = name.lower().rstrip(". "), tail.startswith(" ")
    if name in _SHORT_UNITS or (len(name) > 2 and name.removesuffix("s") in _SHORT_UNITS):
        return is_apart or len(name) > 1
    is_known = name in _UNITS or name.removesuffix("s") in _UNITS or name.split()[0] in _POWERS
    is_product = tail.endswith("}") and all(word in _SHORT_UNITS for word in name.split())  # m s^{-1}
    return is_known or (is_apart and (len(name) > 3 or is_product))


def digits_and_base(text: str) -> tuple[str, str]:
    """`1011_2` -> ("1011", "2"); (text, "") where no base is given, as for the unknown `x_1`."""
    match = _BASE.fullmatch(text)
    if match is None or not (match[1].isdigit() or _DIGITS.fullmatch(match[1])):
        return text, ""
    return match[1], _BASES.get(match[2], match[2])


def residue_and_modulus(text: str) -> tuple[str, str]:
    r"""`1\pmod{4}` -> ("1", "4"); (text, "") where there is none."""
    match = _MODULUS.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def _unit(name: str, power: str) -> str:
    parts = name.lower().rstrip(". ").split()
    while parts and parts[0] in _POWERS:
        power = _POWERS[parts.pop(0)]
    if power.startswith("-") and len(parts) > 1:  # m s^{-2} is m/s^2
        parts[-2:], power = [f"{parts[-2]}/{parts[-1]}"], power.strip("-1")
    name = " ".join(parts)
    is_plural = name.endswith("s") and not name.endswith("ss") and (len(name) > 3 or name[:-1] in _UNITS)
    singular = name[:-1] if is_plural else name
    name = _UNITS.get(name) or _UNITS.get(singular, singular)
    return f"{name}^{power}" if power else name


_DIGITS = re.compile(r"(?=.*\d)[0-9A-Fa-f]+|[A-F]{2,}")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip
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
