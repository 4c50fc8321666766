r"""The normal form of an answer's notation: what encloses it, LaTeX spellings, and a trailing unit taken off."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from evolve.verify.numerals import read_number
from evolve.verify.printed import from_printed


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
    r"(?<=[\w})\].%!|'])\s*\\(?:text|mbox|mathrm|textrm|rm)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?\.?\s*$"
)
_QUANTITY = re.compile(
    r"(.*(?:[\d})]|\\pi(?= )))( ?)([A-Za-z]+(?:(?:\.? |\.| ?/ ?)[A-Za-z]+)*)\.?(?:\s*\^\s*\{?(\d)\}?)?"
)
"""Something with a number, a space or none, words, and the power of the last one."""
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
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ounce": "oz ounce ounces",
        "pound": "lb lbs pound pounds",
        "ton": "ton tons",
        "ml": "ml milliliter milliliters millilitre millilitres",
        "l": "l liter liters litre litres",
        "cup": "cup cups",
        "pint": "pint pints",
        "quart": "quart quarts",
        "gallon": "gal gallon gallons",
        "mile/hour": "mph",
        "km/hour": "kmh kph",
        "radian": "rad radian radians",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "euro": "euro euros eur",
        "": "men",
    }.items()
    for name in names.split()
}


_MONEY = {"$": "dollar", "€": "euro", "£": "sterling"}
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PART = re.compile(
    r"(?:hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million|billion)ths?)"
)
_NO_UNITS = frozenset(
    (
        *("am", "pm", "squared", "cubed", "factorial", "plus", "minus", "times", "over", "divided", "choose"),
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "eleven", "twelve"),
    )
)
"""Words that change what the number before them says."""


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
    money = re.match(r"[+-]?\s*\\?([$€£])\s*[\d.]", text)
    text = re.sub(r"\\?\$|[€£]", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    text, unit = take_unit(text)
    if money:
        unit = _MONEY[money[1]] + (unit if unit.startswith("/") else "")
    text = re.sub(r"(?<=\d)\s*\\%$", "%", text)
    text = re.sub(r"^([+-]) (?=\d)", r"\1", text)
    return from_printed(text), unit


def take_unit(text: str) -> tuple[str, str]:
    """Take a trailing unit off a quantity; before it, work out a word of scale: 3 million dollars."""
    match = re.fullmatch(r"([+-]?[\d.,]+) (m/s|ml|mL|mg|[mgshL])", text)
    if match:
        return match[1], _unit(match[2])
    match = _UNIT_MACRO.search(text)
    if match and "\\text" not in text[: match.start()] and "\\mbox" not in text[: match.start()]:
        body = text[: match.start()].strip()
        if not any(map(_is_of_number, match[1].split())):
            exponent = re.search(r"\^\s*\{?(\d)\}?\.?\s*$", match[0])
            return body, _unit(match[1] + (f"^{exponent[1]}" if exponent else ""))
        text = f"{body} {match[1].strip()}"
    match = _QUANTITY.fullmatch(text) if len(text) < 200 else None
    if not match or not re.search(r"\d", match[1]):
        return text, ""
    number, gap, tail, power = match.groups()
    words = re.sub(r"(?:^| )per | ?/ ?", "/", tail).split()
    lower = [word.lower().rstrip(".") for word in words]
    # Inches and cups: a formula does not end with "in" or "cup".
    if FORMULA_WORDS & set(lower[:-1]) or (lower[-1] in FORMULA_WORDS and lower[-1] not in ("in", "cup")):
        return text, ""
    if lower[0] in ("percent", "percentage"):
        return number + "%", ""
    if lower[0] in ("degree", "degrees"):
        return number, ""
    kept = len(words)
    while kept and _is_unit(lower[kept - 1]) and (kept > 1 or gap or lower[0].partition("/")[0] in _UNITS):
        kept -= 1
    if 0 < kept < len(words) and lower[kept - 1] in ("sq", "cu"):
        kept -= 1
    unit = _unit(" ".join(words[kept:]) + (f"^{power}" if power else "")) if kept < len(words) else ""
    value = read_number(number)
    if value and not value.percent and kept and all(word in _SCALES for word in lower[:kept]):
        return str(value.value * math.prod(_SCALES[word] for word in lower[:kept])), unit
    if kept == len(words):
        return text, ""
    return number + (gap + " ".join(words[:kept]) if kept else ""), unit


def _is_of_number(word: str) -> bool:
    """Whether a word belongs to the number before it, or stands for one: no unit."""
    plain = word.lower().replace(".", "")
    return plain in _NO_UNITS or plain in _SCALES or _PART.fullmatch(plain) is not None


def _is_unit(word: str) -> bool:
    """Whether a word can be a unit: a known one, or long enough not to be a product of variables."""
    parts = [part for part in word.split("/") if part]
    return max(map(len, parts)) > 1 and all(
        (part in _UNITS and part not in ("mg", "ml"))
        or (len(part) >= 4 and re.search("[aeiou]", part) and not _is_of_number(part))
        for part in parts
    )


def _unit(words: str) -> str:
    """The canonical name of a known unit, with its power where stated; empty for others, which equal any.

    A rate (`km/hour`) is known by its parts, whatever they are.
    """
    words = re.sub(r"(?:^| )per | ?/ ?", "/", re.sub(r"\s+", " ", words).strip().lower())
    match = re.fullmatch(
        r"(square |cubic |sq\.? |cu\.? )?((?:[a-z]+\.?)?(?:/[a-z]+)*)\.?(?:\s*\^\s*\{?(\d)\}?)?", words
    )
    if not match or ("/" not in match[2] and match[2].rstrip(".") not in _UNITS):
        return ""
    power = match[3] or {"s": "2", "c": "3"}.get((match[1] or " ")[0], "")
    names = [part.rstrip(".") for part in match[2].split("/")]
    name = "/".join(_UNITS.get(part, part.removesuffix("s")) for part in names)
    return f"{name}^{power}" if power else name


def units_differ(a: str, b: str) -> bool:
    """Whether two units cannot be the same; an unknown unit or power can be any."""
    if not a or not b:
        return False
    (base, _, power), (other, _, other_power) = a.partition("^"), b.partition("^")
    return base != other or bool(power and other_power and power != other_power)
