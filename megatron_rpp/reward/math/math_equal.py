"""Whether two answers are the same. math-verify does the mathematics of scalars; the structure is settled here.

An answer is a list of parts in any order (`1, 2`, `x = 1 or x = 2`); a part is words, a letter of a choice,
a bracket (`(1,2]`, a point, a set), a set on the real line, or a scalar with or without a name and a unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megatron_rpp.reward.math.answer_parts import bracketed, choice, letters, split_list, without_conditions, words
from megatron_rpp.reward.math.extract import has_no_value, plain_number
from megatron_rpp.reward.math.names import (
    as_point,
    chain,
    each_named,
    is_relation,
    named,
    rounded_value,
    stated_value,
)
from megatron_rpp.reward.math.normal_form import compact, is_grouped, normal_form, without_separators
from megatron_rpp.reward.math.symbolic import is_rounding, is_same_set, is_same_value
from megatron_rpp.reward.math.units import digits_and_base, residue_and_modulus, value_and_unit

MAX_PARTS = 40
"""An answer with more parts is compared as it is written."""
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])\s*")
_MINUS_PLUS = re.compile(r"\\mp(?![A-Za-z])\s*")
_CAPITALS = re.compile(r"[A-Z]{2,}")
_FIGURE = re.compile(r"\\(?:angle|triangle|overline|widehat|odot)(?![A-Za-z])")
_PRODUCT = re.compile(r"[a-z](?: ?[a-z]){1,2}")
_JOINED = re.compile(r"[a-z]{2,3}")
_VARIABLES = re.compile(r"[abcxyz]+|[uvw]+|[b-df-hj-np-tv-z]+")
"""Letters that make up hardly a word in any order: those that name variables together, and no vowels."""
_DEGREE = re.compile(r"\s*\^\\circ")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot)")


def is_equal(answer: str, gold: str) -> bool:
    """Whether `answer` says what `gold` says. Both are final answers, without the sentence around them."""
    given, wanted = without_conditions(normal_form(answer)), without_conditions(normal_form(gold))
    if not given or not wanted:
        return False
    if compact(given) == compact(wanted):
        return True
    letter, wanted_letter = choice(given)[0], choice(wanted)[0]
    if wanted_letter:
        return letter == wanted_letter or _is_equal(given, wanted)
    readings = {(given, wanted), (without_separators(given), without_separators(wanted))}
    return any(_is_equal(*reading) for reading in sorted(readings) if not any(map(is_grouped, reading)))


def _is_equal(given: str, wanted: str) -> bool:
    said = words(given), words(wanted)
    if "no solution" in said and {given, wanted} & {r"\emptyset", r"\{\}"}:
        return True
    if (said[0] and said[0] == said[1] and len(said[0]) > 2) or _are_same_choices(given, wanted):
        return True
    same_set = is_same_set(given, wanted)
    if same_set is not None:
        return same_set
    parts, wanted_parts = _parts(given), _parts(wanted)
    return _same_lists(parts, wanted_parts, _same_part) or _same_points(parts, wanted_parts)


def _are_same_choices(given: str, wanted: str) -> bool:
    """`AC` and `A, C`: one of them is a list. Written together, letters may be a name, and `AC` is not `CA`."""
    is_list = len(split_list(given)) > 1 or len(split_list(wanted)) > 1
    return is_list and letters(given) == letters(wanted) != ""


def _parts(text: str) -> list[str]:
    """The list that an answer is, or the elements of a set; a part with plus or minus is two."""
    name, value = named(text)
    outer = bracketed(value)
    if outer is not None and outer.opening == "{":
        parts = [f"{name}={item}" if name and not is_relation(item) else item for item in outer.items]
    else:
        parts = [each for part in split_list(text) for each in each_named(part)]
    signed = [each for part in parts for each in _signed(part)]
    return [] if [named(part)[1] for part in signed] == [r"\emptyset"] else signed


def _signed(part: str) -> list[str]:
    """Both values of a part with plus or minus; with minus or plus, too, all its signs change together."""
    if _MINUS_PLUS.search(part) is not None:
        part = _MINUS_PLUS.sub(r"\\pm -" if _PLUS_MINUS.search(part) else r"\\pm ", part)
        return [_PLUS_MINUS.sub(sign, part).replace("+-", "-").replace("--", "+") for sign in "+-"]
    match = _PLUS_MINUS.search(part)
    if match is None:
        return [part]
    plus = "+" if re.search(r"[\w)}]\s*$", part[: match.start()]) else ""
    return [_PLUS_MINUS.sub(sign, part, count=1) for sign in (plus, "-")]


def _same_lists(given: Sequence[str], wanted: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    """Whether both have the same elements, in any order and however often."""
    if max(len(given), len(wanted)) > MAX_PARTS or bool(given) != bool(wanted):
        return False
    found: set[str] = set()
    for each in given:
        equal = {other for other in wanted if same(each, other)}
        if not equal:
            return False
        found |= equal
    return found == set(wanted)


def _same_points(given: Sequence[str], wanted: Sequence[str]) -> bool:
    """`x = 1, y = 2` for `(1,2)`, and the other way round."""
    for parts, others in ((given, wanted), (wanted, given)):
        point = as_point(parts)
        other = bracketed(named(others[0])[1]) if len(others) == 1 else None
        if point is None or other is None or (other.opening, other.closing) != ("(", ")"):
            continue
        items = zip(point.items, other.items, strict=False)
        return len(point.items) == len(other.items) and all(_same_part(a, b) for a, b in items)
    return False


def _same_part(given: str, wanted: str) -> bool:
    if compact(given) == compact(wanted):
        return True
    if (same_words := _same_words(given, wanted)) is not None:
        return same_words
    (name, value), (wanted_name, wanted_value) = named(given), named(wanted)
    if name and wanted_name and name != wanted_name and len(name) == len(wanted_name) == 1:
        return False
    if is_relation(value) and not is_relation(wanted):
        value = stated_value(given)
    if is_relation(value) or is_relation(wanted_value):
        return is_relation(given) and is_relation(wanted) and _same_relation(given, wanted)
    exact, rounded = rounded_value(given)
    return _same_value(value, wanted_value) or (
        "." in wanted_value and _same_value(rounded, wanted_value) and is_rounding(exact, rounded)
    )


def _same_words(given: str, wanted: str) -> bool | None:
    """Whether they say the same; None where they are no words, or letters of a product such as `xyz`."""
    if _CAPITALS.fullmatch(given) and _CAPITALS.fullmatch(wanted):
        return False  # two names, or they were the same
    said = words(given), words(wanted)
    if _JOINED.fullmatch(given) and _JOINED.fullmatch(wanted):  # `xy` for `yx`, and not `act` for `cat`
        return None if _VARIABLES.fullmatch(given) and _VARIABLES.fullmatch(wanted) else said[0] == said[1]
    if not any(len(word) > 2 or word == "no" for word in said):
        return None
    if said[0] == said[1] or "no" in said:
        return said[0] == said[1]
    are_products = all(_PRODUCT.fullmatch(text) or not word for text, word in zip((given, wanted), said, strict=True))
    return None if are_products else False


def _same_relation(given: str, wanted: str) -> bool:
    (operators, values), (wanted_operators, wanted_values) = chain(given), chain(wanted)
    if operators and operators == wanted_operators and all(map(_same_value, values, wanted_values)):
        return True
    return is_same_value(given, wanted)


def _same_value(given: str, wanted: str) -> bool:
    outer, wanted_outer = bracketed(given), bracketed(wanted)
    if outer is None and wanted_outer is None:
        return _same_scalar(given, wanted)
    if outer is None or wanted_outer is None:
        return False
    if (outer.opening, outer.closing) != (wanted_outer.opening, wanted_outer.closing):
        return False
    if outer.opening == "{":
        return _same_lists(outer.items, wanted_outer.items, _same_part)
    pairs = zip(outer.items, wanted_outer.items, strict=False)
    return len(outer.items) == len(wanted_outer.items) and all(_same_part(a, b) for a, b in pairs)


def _same_scalar(given: str, wanted: str) -> bool:
    (value, unit), (wanted_value, wanted_unit) = value_and_unit(given), value_and_unit(wanted)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    if {unit, wanted_unit} == {"degree", ""} and r"\pi" in (value, wanted_value)[unit != ""]:
        value, wanted_value = (_in_radians(v, u) for v, u in ((value, unit), (wanted_value, wanted_unit)))
    for split in (digits_and_base, residue_and_modulus):
        (plain, base), (wanted_plain, wanted_base) = split(value), split(wanted_value)
        if base or wanted_base:  # it is often left out
            return plain == wanted_plain and (base == wanted_base or not (base and wanted_base))
    ratio, wanted_ratio = value.split(":"), wanted_value.split(":")
    if max(len(ratio), len(wanted_ratio)) > 2:
        return len(ratio) == len(wanted_ratio) and all(map(_same_number, ratio, wanted_ratio))
    if _FIGURE.search(value) or _FIGURE.search(wanted_value):  # names of points, not products
        return compact(value) == compact(wanted_value)
    if bool(_DEGREE.search(value)) != bool(_DEGREE.search(wanted_value)) and not _TRIGONOMETRY.search(value + wanted):
        value, wanted_value = _DEGREE.sub("", value), _DEGREE.sub("", wanted_value)
    if _same_number(value, wanted_value):
        return True
    if (unit == "%") != (wanted_unit == "%"):  # 0.5 for 50%
        percent, other = (value, wanted_value) if unit == "%" else (wanted_value, value)
        return _same_number(rf"\frac{{{percent}}}{{100}}", other)
    return False


def _in_radians(value: str, unit: str) -> str:
    return rf"{value}\cdot\frac{{\pi}}{{180}}" if unit else value


def _same_number(given: str, wanted: str) -> bool:
    number, wanted_number = plain_number(given), plain_number(wanted)
    if number is not None and wanted_number is not None and (number == wanted_number or "/" not in given + wanted):
        return number == wanted_number
    if wanted_number is not None and number is None and has_no_value(given):
        return False
    return is_same_value(given, wanted)
