"""One spelling for answers that are written differently and mean the same. Text in, text out, no mathematics.

Meant for answers of at most `extract.MAX_ANSWER_CHARS` characters.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_rpp.reward.math.latex_arguments import brace_arguments

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
    "dbinom": r"\binom", "tbinom": r"\binom",
    "dots": r"\ldots", "cdots": r"\ldots", "dotsc": r"\ldots", "backslash": r"\setminus ", "mid": "|", "vert": "|",
    "lvert": "|", "rvert": "|", "bmod": r"\pmod ", "mod": r"\pmod ", "bar": r"\overline", "lg": r"\log_{10}",
}  # fmt: skip
_FONTS = r"text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|underline|boxed|fbox|boldsymbol|bm"
_FONTS += r"|vec|overrightarrow"
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_FONT = re.compile(r"\\(?:" + _FONTS + r")\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])(?=\\(?:text|textrm|mathrm|mbox)\s*\{\s*[A-Za-z])")
_SYMBOL_UNIT = re.compile(r"(\\[A-Za-z]+)(?=\\(?:text|textrm|mathrm|mbox)\s*\{\s*[A-Za-z])")
_COLOR = re.compile(r"\\(?:text)?color\s*\{\w*\}\s*(?:\{([^{}]*)\})?")
_PHANTOM = re.compile(r"\\(?:[hv]?phantom|[hv]space\*?)\s*\{[^{}]*\}")
_SIGN = re.compile(r"(^|[(\[,=])\s*\+\s*(?=[\w\\.(])")
_LOOSE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_SPACES = re.compile(r"(?<!\\)\\[,;: !]|\\\\(?=\s*$)|~|\s+")
_GROUPED = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:\{,\}|,?\\[,!: ]+)\d{3}(?:(?:\{,\}|,?\\[,!: ]+)\d{3})*| \d{3}(?: \d{3})*)(?!\d)"
)
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_ZERO_GROUP = re.compile(r"(?<=\d),0\d\d(?!\d)")
_BARE_SQRT = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|ln|log|infinity|infty)(?![A-Za-z])")
_OVER = re.compile(r"\{\s*([^{}]+?)\s*\\over\s*([^{}]+?)\s*\}")
_CHOOSE = re.compile(r"\{\s*([^{}]+?)\s*\\choose\s*([^{}]+?)\s*\}")
_SEGMENT = re.compile(r"\\overline\{\s*([A-Z]{2})\s*\}")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|dot)\{(\d+)\}(?!\s*[\d\\])")
_MODULUS = re.compile(r"\(\s*(?:\\p)?mod\s+\{?(\w+)\}?\s*\)|\\pmod\s+(\w+)")
_MILLIONS = re.compile(r"(?<=\d)\s*(hundred|thousand|million|billion|trillion)s?\b")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*)?(?:\{\s*)?(?:st|nd|rd|th)(?:\s*\})?$")
_RATIO = re.compile(r"(\d+)\s+to\s+(\d+)")
_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)|\\times\s*(?=\{10\}\s*\^)")
_TEN = re.compile(r"(?<=times )\{10\}")
_SCRIPT = re.compile(r"\^\s*\{\s*\\circ\s*\}")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\w.])")
_MIXED = re.compile(r"(?<![\w.}^_])(\d+)\s*(\\frac\{\d+\}\{\d+\})")
_MIXED_SLASH = re.compile(r"(?<![\w.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])")
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_BRACED = re.compile(r"\{([^{}]*)\}")


def normal_form(text: str) -> str:
    """The answer in plain ASCII LaTeX: one command a meaning, no fonts, sizes or spacing commands."""
    text = _ascii(text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    text = _SPACES.sub(" ", text)
    text = _unwrap(_PHANTOM.sub(" ", _COLOR.sub(lambda m: m[1] or "", text)))
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m.group()), text)
    text = _BARE_SQRT.sub(lambda m: r"\infty" if m[1][:2] == "in" else "\\" + m[1], text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _OVER.sub(r"\\frac{\1}{\2}", text))
    text = text.replace(":=", "=").replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    text = brace_arguments(_SCRIPT.sub(r"^\\circ", text.replace("...", r"\ldots ")))
    text = _TEN.sub("10", _TIMES.sub(r"\\times ", text))
    text = _words_of_numbers(_REPEATING.sub(_repeating, _SEGMENT.sub(r"\1", text)))
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    text = _MIXED.sub(r"(\1+\2)", text)
    text = _MIXED_SLASH.sub(r"(\1+\\frac{\2}{\3})", text)
    text = re.sub(r"\s+", " ", _SIGN.sub(r"\1", text)).strip(" $*`,;").rstrip(".,; ")
    return _without_outer_braces(text)


def _words_of_numbers(text: str) -> str:
    """`5 million`, `7th`, `3 to 4` and `(mod 7)` in figures."""
    text = _MODULUS.sub(lambda m: rf"\pmod{{{m[1] or m[2]}}}", text)
    text = _MILLIONS.sub(lambda m: rf"\cdot 10^{{{_ZEROS[m[1]]}}}", text)
    return _RATIO.sub(r"\1:\2", _ORDINAL.sub("", text))


def _repeating(match: re.Match[str]) -> str:
    """0.1 with 6 repeated for ever is 15/90: the digits once, less those before, over as many nines and zeros."""
    whole, start, period = match[1] or "0", match[2], match[3]
    top = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def compact(text: str) -> str:
    """The text without spaces, but for those between two digits."""
    return _LOOSE_SPACE.sub("", text)


def without_separators(text: str) -> str:
    """The text with `1,234` as 1234, outside of brackets, where it may be two coordinates."""
    if text.count("(") + text.count("[") + text.count("\\{"):
        return text
    return _COMMAS.sub(lambda m: m.group().replace(",", ""), text)


def is_grouped(text: str) -> bool:
    """Whether it can be nothing but one number with separators: `3,000` is not the list of 3 and 000."""
    return (
        _COMMAS.search(text) is not None and _ZERO_GROUP.search(text) is not None and without_separators(text) != text
    )


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
    text = _UNIT.sub(" ", _SYMBOL_UNIT.sub(r"\1 ", text))  # 5\\text{m} is 5 metres, 5m is 5 times m
    for _ in range(4):
        unwrapped = _FONT.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _without_outer_braces(text: str) -> str:
    while (match := _BRACED.fullmatch(text)) is not None:
        text = match[1].strip()
    return text
