"""Whether two answers are the same. math-verify does the mathematics of scalars; the structure is settled here.

An answer is a list of parts in any order (`1, 2`, `x = 1 or x = 2`); a part is words, a letter of a choice,
a bracket (`(1,2]`, a point, a set), a set on the real line, or a scalar with or without a name and a unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megatron_rpp.reward.math.answer_parts import (
    bracketed,
    choice,
    digits_and_base,
    is_relation,
    named,
    split_list,
    value_and_unit,
    words,
)
from megatron_rpp.reward.math.extract import has_no_value, plain_number
from megatron_rpp.reward.math.normal_form import compact, normal_form, without_separators
from megatron_rpp.reward.math.symbolic import is_same_set, is_same_value

MAX_PARTS = 40
"""An answer with more parts is compared as it is written."""
_PLUS_MINUS = re.compile(r"\\pm\b\s*")


def is_equal(answer: str, gold: str) -> bool:
    """Whether `answer` says what `gold` says. Both are final answers, without the sentence around them."""
    given, wanted = normal_form(answer), normal_form(gold)
    if not given or not wanted:
        return False
    if compact(given) == compact(wanted):
        return True
    letter, wanted_letter = choice(given)[0], choice(wanted)[0]
    if wanted_letter:
        return letter == wanted_letter or _is_equal(given, wanted)
    readings = {(given, wanted), (without_separators(given), without_separators(wanted))}
    return any(_is_equal(*reading) for reading in sorted(readings))


def _is_equal(given: str, wanted: str) -> bool:
    said = words(given), words(wanted)
    if "no solution" in said and {given, wanted} & {r"\emptyset", r"\{\}"}:
        return True
    if any(len(word) > 2 for word in said):
        return said[0] == said[1]
    same_set = is_same_set(given, wanted)
    return _same_lists(_parts(given), _parts(wanted), _same_part) if same_set is None else same_set


def _parts(text: str) -> list[str]:
    """The list that an answer is, or the elements of a set; a part with plus or minus is two."""
    outer = bracketed(text)
    parts = list(outer.items) if outer is not None and outer.opening == "{" else split_list(text)
    signed = [_PLUS_MINUS.sub(sign, part, count=1) for part in parts for sign in _signs(part)]
    return [] if signed == [r"\emptyset"] else signed


def _signs(part: str) -> list[str]:
    match = _PLUS_MINUS.search(part)
    if match is None:
        return [""]
    return ["+" if re.search(r"[\w)}]\s*$", part[: match.start()]) else "", "-"]


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


def _same_part(given: str, wanted: str) -> bool:
    if compact(given) == compact(wanted):
        return True
    (name, value), (wanted_name, wanted_value) = named(given), named(wanted)
    if name and wanted_name and name != wanted_name and len(name) == len(wanted_name) == 1:
        return False
    if is_relation(value) or is_relation(wanted_value):
        return is_relation(given) and is_relation(wanted) and is_same_value(given, wanted)
    return _same_value(value, wanted_value)


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
    (digits, base), (wanted_digits, wanted_base) = digits_and_base(value), digits_and_base(wanted_value)
    if base or wanted_base:  # the base is often left out
        return digits == wanted_digits and (base == wanted_base or not (base and wanted_base))
    if _same_number(value, wanted_value):
        return True
    if (unit == "%") != (wanted_unit == "%"):  # 0.5 for 50%
        percent, other = (value, wanted_value) if unit == "%" else (wanted_value, value)
        return _same_number(rf"\frac{{{percent}}}{{100}}", other)
    return False


def _same_number(given: str, wanted: str) -> bool:
    number, wanted_number = plain_number(given), plain_number(wanted)
    if number is not None and wanted_number is not None and (number == wanted_number or "/" not in given + wanted):
        return number == wanted_number
    if wanted_number is not None and number is None and has_no_value(given):
        return False
    return is_same_value(given, wanted)
