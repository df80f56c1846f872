"""What sympy and math-verify say of two normalized answers. Runs in worker processes only: it may take for ever."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from megatron_rpp.reward.math.answer_parts import bracketed, split_list
from megatron_rpp.reward.math.names import UNKNOWN, named

CLOSE = sympy.Float("1e-5")
_CONFIG = LatexExtractionConfig(
    # Units are taken off before, with care: math-verify's own list takes the t off 2t.
    normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
)
_OPERATOR = re.compile(r"(<|>|\\(?:le|ge|ne)(?![A-Za-z]))")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"[A-Za-z]")
_UNKNOWN = re.compile(UNKNOWN)
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_IMAGINARY = re.compile(r"(\d)i\b")
_INTERSECTION = re.compile(r"\s*(?:\\cap(?![A-Za-z])|\band\b)\s*")
_UNION = re.compile(r"\s*(?:\\cup(?![A-Za-z])|\bor\b)\s*")
_WITHOUT = re.compile(r"\s*(?:\\setminus(?![A-Za-z])|(?<=[\])}])\s*-(?=\s*\\\{))\s*")
_EXCEPTION = re.compile(rf",\s*(?={UNKNOWN}\s*\\ne(?![A-Za-z]))")
ROUNDED = 0.005


def is_same_value(given: str, wanted: str) -> bool:
    """Whether two expressions or equations are equal."""
    if _differ_in_case(given, wanted):  # math-verify takes x for X
        return False
    a = _parsed(given)
    b = _parsed(wanted) if a is not None else None
    # Numbers are told apart by their digits first: math-verify would simplify their difference.
    return a is not None and b is not None and _is_close(a, b) and bool(verify(b, a, timeout_seconds=None))


def is_rounding(exact: str, rounded: str) -> bool:
    """Whether one number is another one to about three digits."""
    a, b = _parsed(exact), _parsed(rounded)
    if not (_is_real(a) and _is_real(b)):
        return False
    return bool(abs(sympy.N(a - b)) <= ROUNDED * abs(sympy.N(a)))


def is_same_set(given: str, wanted: str) -> bool | None:
    """Whether two sets on the real line are the same; None where they are not both that, or both but a bracket."""
    if bracketed(given) is not None and bracketed(wanted) is not None:
        return None
    a = real_set(given)
    b = real_set(wanted) if a is not None else None
    if a is None or b is None:
        return None
    return bool(a[1] == b[1]) and not (a[0] and b[0] and a[0] != b[0])


def real_set(text: str) -> tuple[str, sympy.Set] | None:
    r"""(unknown or "", set) of `(1,2]`, `(0,1)\cup(2,3)`, `1 < x \le 2`, `x < 1 or x > 2`; None for others."""
    unknown, text = named(text)
    outer = bracketed(text)
    if outer is not None and outer.opening == "{":
        return None
    if outer is None and not _OPERATOR.search(text) and "\\cup" not in text and "mathbb{R}" not in text:
        return None
    names, parts = {unknown}, []
    for union in _UNION.split(_EXCEPTION.sub(" and ", text)):
        found = [_difference(piece) for piece in _INTERSECTION.split(union)]
        parts.append(sympy.Intersection(*(piece[1] for piece in found if piece is not None)))
        names |= {piece[0] if piece is not None else "none" for piece in found}
    names.discard("")
    return None if "none" in names or len(names) > 1 else ("".join(names), sympy.Union(*parts))


def _difference(text: str) -> tuple[str, sympy.Set] | None:
    r"""`A`, or `A \setminus B`."""
    whole, *less = (_piece(piece.strip()) for piece in _WITHOUT.split(text))
    if whole is None or any(piece is None for piece in less):
        return None
    return whole[0], sympy.Complement(whole[1], sympy.Union(*(piece[1] for piece in less if piece is not None)))


def _piece(text: str) -> tuple[str, sympy.Set] | None:
    if text == r"\mathbb{R}":
        return "", sympy.S.Reals
    outer = bracketed(text)
    if outer is not None and outer.opening == "{":
        numbers = [_parsed(item) for item in outer.items]
        return ("", sympy.FiniteSet(*numbers)) if all(map(_is_real, numbers)) else None
    if outer is not None and len(outer.items) == 2:
        low, high = map(_parsed, outer.items)
        return _interval(low, high, outer.opening == "(", outer.closing == ")")
    return _solved(_OPERATOR.split(text)) if len(split_list(text)) == 1 else None


def _solved(parts: list[str]) -> tuple[str, sympy.Set] | None:
    """The solutions of [1, <, x, \\le, 2] or [x, >, 1]."""
    parts = [part.strip() for part in parts]
    if len(parts) not in (3, 5):
        return None
    middle = 2 if len(parts) == 5 or _UNKNOWN.fullmatch(parts[2]) else 0
    if not _UNKNOWN.fullmatch(parts[middle]):
        return _solved_by_sympy(_parsed(" ".join(parts)))
    solved: sympy.Set = sympy.S.Reals
    for i in range(1, len(parts), 2):
        is_left = i < middle
        half = _half_line(_parsed(parts[i - 1] if is_left else parts[i + 1]), parts[i], is_left)
        if half is None:
            return None
        solved = sympy.Intersection(solved, half)
    return parts[middle], solved


def _solved_by_sympy(relation: Any) -> tuple[str, sympy.Set] | None:
    if not isinstance(relation, sympy.core.relational.Relational) or len(relation.free_symbols) != 1:
        return None
    try:
        return str(relation.free_symbols.pop()), relation.as_set()
    except NotImplementedError:
        return None


def _half_line(bound: Any, operator: str, is_left: bool) -> sympy.Set | None:
    """Where `bound OPERATOR x` holds, or with is_left false `x OPERATOR bound`."""
    if not _is_real(bound):
        return None
    if operator == r"\ne":
        return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(bound))
    is_open, x_is_greater = operator in "<>", (operator in ("<", r"\le")) == is_left
    if x_is_greater:
        return sympy.Interval(bound, sympy.oo, is_open, True)
    return sympy.Interval(-sympy.oo, bound, True, is_open)


def _interval(low: Any, high: Any, is_left_open: bool, is_right_open: bool) -> tuple[str, sympy.Set] | None:
    if not (_is_real(low) and _is_real(high)):
        return None
    return "", sympy.Interval(low, high, is_left_open, is_right_open)


def _is_real(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols and bool(value.is_extended_real)


@cache
def _parsed(text: str) -> Any:
    text = _DEGREES.sub(r"{(\1\\cdot\\frac{\\pi}{180})}", _IMAGINARY.sub(r"\1 i", text))
    found = parse(rf"\boxed{{{text}}}", [_CONFIG], fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return None
    if not isinstance(found[0], sympy.Expr):
        return found[0]
    return found[0].subs({symbol: sympy.I for symbol in found[0].free_symbols if symbol.name == "i"})


def _differ_in_case(given: str, wanted: str) -> bool:
    a, b = (set(_LETTER.findall(_COMMAND.sub(" ", text))) for text in (given, wanted))
    return any(x not in b and x.swapcase() in b and x.swapcase() not in a for x in a)


def _is_close(a: Any, b: Any) -> bool:
    """math-verify compares numbers to six decimals, which calls all small ones equal, and long ones too."""
    if not all(isinstance(x, sympy.Expr) and not x.free_symbols for x in (a, b)):
        return True
    a, b = sympy.sympify(a).doit(), sympy.sympify(b).doit()
    if a.is_Rational and b.is_Rational:  # a decimal is a Float, which may be rounded
        return bool(a == b)
    if a == b or not (a.is_finite and b.is_finite):
        return bool(a == b)
    difference, size = abs(sympy.N(a - b, 30)), abs(sympy.N(b, 30))
    return bool(difference <= CLOSE * size)
