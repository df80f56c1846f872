"""One spelling for answers that are written differently and mean the same. Text in, text out, no mathematics.

Meant for answers of at most `extract.MAX_ANSWER_CHARS` characters.
"""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": "/", "\u2215": "/", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u03c0": r"\pi ",
    "\u221e": r"\infty ", "\u221a": r"\sqrt", "\u00b0": r"^\circ ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u211d": r"\mathbb{R}", "\u27e8": "(",
    "\u27e9": ")", "\u2248": r"\approx ",
}  # fmt: skip
_COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le ", "leqslant": r"\le ", "geq": r"\ge ",
    "geqslant": r"\ge ", "neq": r"\ne ", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "langle": "(",
    "rangle": ")", "lbrack": "[", "rbrack": "]", "varnothing": r"\emptyset ", "colon": ":", "degree": r"^\circ ",
    "quad": " ", "qquad": " ", "left": "", "right": "", "big": "", "Big": "", "bigg": "", "Bigg": "", "bigl": "",
    "bigr": "", "Bigl": "", "Bigr": "", "displaystyle": "", "textstyle": "", "limits": "", "rm": "", "bf": "", "it": "",
    "land": " and ", "lor": " or ", "R": r"\mathbb{R}", "reals": r"\mathbb{R}", "euro": "\u20ac", "pounds": "\u00a3",
}  # fmt: skip
_FONTS = r"text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|underline|boxed|fbox|boldsymbol|bm"
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_FONT = re.compile(r"\\(?:" + _FONTS + r")\s*\{([^{}]*)\}")
_COLOR = re.compile(r"\\(?:text)?color\s*\{\w*\}\s*(?:\{([^{}]*)\})?")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*\{[^{}]*\}")
_SIGN = re.compile(r"(^|[(\[,=])\s*\+\s*(?=[\w\\.(])")
_LOOSE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_SPACES = re.compile(r"(?<!\\)\\[,;: !]|\\\\(?=\s*$)|~|\s+")
_GROUPED = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:\{,\}|,?\\[,!: ]+)\d{3}(?:(?:\{,\}|,?\\[,!: ]+)\d{3})*| \d{3}(?: \d{3})*)(?!\d)"
)
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_FRAC = re.compile(r"\\frac\s*(?:(\d)\s*(\d)(?![\d}])|(\d)\s*(\{)|(\{[^{}]*\})\s*(\d))")
_SQRT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z]\b|\([^()]*\))")
_BARE_SQRT = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|ln|log|infinity|infty)(?![A-Za-z])")
_OVER = re.compile(r"\{\s*([^{}]+?)\s*\\over\s*([^{}]+?)\s*\}")
_SCRIPT = re.compile(r"\^\s*\{\s*\\circ\s*\}")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\w.])")
_MIXED = re.compile(r"(?<![\w.}^_])(\d+)\s*(\\frac\{\d+\}\{\d+\})")
_MIXED_SLASH = re.compile(r"(?<![\w.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])")
_BRACED = re.compile(r"\{([^{}]*)\}")


def normal_form(text: str) -> str:
    """The answer in plain ASCII LaTeX: one command a meaning, no fonts, sizes or spacing commands."""
    text = _ascii(text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    text = _SPACES.sub(" ", text)
    text = _unwrap(_PHANTOM.sub(" ", _COLOR.sub(lambda m: m[1] or "", text)))
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m.group()), text)
    text = _BARE_SQRT.sub(lambda m: r"\infty" if m[1][:2] == "in" else "\\" + m[1], text)
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = _SCRIPT.sub(r"^\\circ", text.replace(":=", "=").replace("<=", r"\le ").replace(">=", r"\ge "))
    for _ in range(3):
        text = _FRAC.sub(_braced_fraction, text)
    text = _SQRT.sub(lambda m: r"\sqrt{" + m[1].strip("()") + "}", text)
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    text = _MIXED.sub(r"(\1+\2)", text)
    text = _MIXED_SLASH.sub(r"(\1+\\frac{\2}{\3})", text)
    text = re.sub(r"\s+", " ", _SIGN.sub(r"\1", text)).strip(" $*`,;").rstrip(".,; ")
    return _without_outer_braces(text)


def compact(text: str) -> str:
    """The text without spaces, but for those between two digits."""
    return _LOOSE_SPACE.sub("", text)


def without_separators(text: str) -> str:
    """The text with `1,234` as 1234, outside of brackets, where it may be two coordinates."""
    if text.count("(") + text.count("[") + text.count("\\{"):
        return text
    return _COMMAS.sub(lambda m: m.group().replace(",", ""), text)


def _ascii(text: str) -> str:
    return "".join(map(_ascii_char, text)) if not text.isascii() else text


def _ascii_char(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    plain = unicodedata.normalize("NFKC", char)
    if "\u2044" in plain:
        return r"\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    if char.isdigit() and plain.isdecimal():
        return "^{" + plain + "}"
    return plain if 0xFF00 <= ord(char) <= 0xFFEF or char == "\u00a0" else char


def _unwrap(text: str) -> str:
    for _ in range(4):
        unwrapped = _FONT.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _braced_fraction(match: re.Match[str]) -> str:
    first, second, digit, brace, group, last = match.groups()
    if first:
        return rf"\frac{{{first}}}{{{second}}}"
    return rf"\frac{{{digit}}}{brace}" if digit else rf"\frac{group}{{{last}}}"


def _without_outer_braces(text: str) -> str:
    while (match := _BRACED.fullmatch(text)) is not None:
        text = match[1].strip()
    return text
