r"""The normal form of an answer's notation: what encloses it, LaTeX spellings, and a trailing unit taken off."""

from __future__ import annotations

import re
from functools import lru_cache


def extract_answer(text: str) -> str | None:
    r"""The contents of the last complete `\boxed{...}` of `text`; None when there is none."""
    end = len(text)
    while True:
        start = max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))
        if start < 0:
            return None
        opening = text.index("{", start)
        depth = 0
        for position in range(opening, len(text)):
            if text[position] == "{" and text[position - 1] != "\\":
                depth += 1
            elif text[position] == "}" and text[position - 1] != "\\":
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : position].strip()
        end = start


WORDS = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
_SPACES = re.compile(r"(?<!\\)\\[!,;: >]|\\quad|\\qquad|~|\u00a0|\u202f")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_FENCES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|mathstrut)(?![a-zA-Z])\s*")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degrees?(?![a-zA-Z])")
_UNIT_MACRO = re.compile(
    r"(?<=[\d\w})\].])\s*\\(?:text|mbox|mathrm|textrm|rm)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?\.?\s*$"
)
_UNIT_WORD = re.compile(
    r"((?:^|.*[\d})])\s?)(?<=[\d}) ])\s*((?:square |cubic |sq\.? |cu\.? )?[A-Za-z]{2,}(?:[ /][A-Za-z]+){0,3}\.?"
    r"(?:\s*\^\s*\{?\d\}?)?)$"
)
FUNCTIONS = frozenset(
    (
        *("sqrt", "cbrt", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "log", "ln", "exp"),
        *("Rational", "factorial", "Abs"),
    )
)
"""Functions by the names that sympy prints; the lower-case ones are LaTeX macros, too, or nearly."""
FORMULA_WORDS = FUNCTIONS | {"pi", "oo", "infty", "inf", "or", "and", "cup", "in", "mod"}
"""Words in lower case that are part of a formula: neither a unit nor the name of anything."""

_UNITS = {
    name: canonical
    for canonical, names in {
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "second": "s sec secs second seconds",
        "minute": "min mins minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr year years",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
    }.items()
    for name in names.split()
}


def _unwrap(text: str) -> str:
    """Strip what encloses a whole answer: white space, dollars, display brackets, a full stop."""
    while True:
        before = text
        text = text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                if left not in inner:
                    text = inner
                break
        if text.startswith(("\\boxed{", "\\fbox{")) and extract_answer(text) is not None and text.endswith("}"):
            text = extract_answer(text) or text
        if len(text) > 1 and text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        if text == before:
            return text


@lru_cache(maxsize=1 << 12)
def normalise(text: str) -> tuple[str, str]:
    """An answer's normal form, and the unit that was taken off it (canonical; empty: none, or unknown)."""
    text = _unwrap(text.replace("\n", " "))
    text = text.replace("−", "-").replace("–", "-").replace("π", "\\pi ").replace("∞", "\\infty ")
    text = text.replace("∪", "\\cup ").replace("±", "\\pm ").replace("×", "\\times ").replace("·", "\\cdot ")
    text = re.sub(r"√\s*(\d+|\([^()]*\))", lambda m: "\\sqrt{" + m[1].strip("()") + "}", text)
    text = re.sub(r"\s*,\s*\\!\s*", ",", text)
    text = _SPACES.sub(" ", text)
    text = _FENCES.sub("", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"_\{\s*(\d+)\s*\}", r"_\1", text)
    text = re.sub(r"\\(?:ge|geqslant)(?![a-zA-Z])", r"\\geq", re.sub(r"\\(?:le|leqslant)(?![a-zA-Z])", r"\\leq", text))
    text = text.replace("\\varnothing", "\\emptyset").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = _DEGREES.sub("", text)
    text = re.sub(r"\\?\$|[€£]", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    text, unit = _take_unit(text)
    text = re.sub(r"(?<=\d)\s*\\%$", "%", text)
    text = re.sub(r"^([+-]) (?=\d)", r"\1", text)
    return text, unit


def _take_unit(text: str) -> tuple[str, str]:
    """Take a trailing unit off a quantity."""
    match = re.fullmatch(r"([+-]?[\d.,]+) ([mgshL])", text)
    if match:
        return match[1], _unit(match[2])
    match = _UNIT_MACRO.search(text)
    if match and "\\text" not in text[: match.start()] and "\\mbox" not in text[: match.start()]:
        exponent = re.search(r"\^\s*\{?(\d)\}?\.?\s*$", match[0])
        return text[: match.start()].strip(), _unit(match[1] + (f"^{exponent[1]}" if exponent else ""))
    match = _UNIT_WORD.match(text) if len(text) < 200 else None
    if match and re.search(r"\d", match[1]):
        words = match[2].lower().split()
        attached = not match[1].endswith(" ") and match[2] == match[2].lstrip()
        if words[0].rstrip(".") in FORMULA_WORDS or any(w in FORMULA_WORDS for w in words):
            return text, ""
        if attached and text[match.start(2) - 1] != " " and words[0] not in _UNITS:
            return text, ""
        if words[0] in ("percent", "percentage"):
            return match[1].strip() + "%", ""
        if words[0] in ("degree", "degrees"):
            return match[1].strip(), ""
        return match[1].strip(), _unit(match[2])
    return text, ""


def _unit(words: str) -> str:
    """The canonical name of a known unit, with its power where stated; empty for others, which equal any."""
    match = re.fullmatch(r"(square |cubic |sq\.? |cu\.? )?([a-z]+)\.?(?:\s*\^\s*\{?(\d)\}?)?", words.strip().lower())
    if not match or match[2] not in _UNITS:
        return ""
    power = match[3] or {"s": "2", "c": "3"}.get((match[1] or " ")[0], "")
    return f"{_UNITS[match[2]]}^{power}" if power else _UNITS[match[2]]


def units_differ(a: str, b: str) -> bool:
    """Whether two units cannot be the same; an unknown unit or power can be any."""
    if not a or not b:
        return False
    (base, _, power), (other, _, other_power) = a.partition("^"), b.partition("^")
    return base != other or bool(power and other_power and power != other_power)
