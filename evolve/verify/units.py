"""Quantities: the unit that follows a number, words of scale, and which units cannot be the same."""

from __future__ import annotations

import math
import re

from evolve.verify.numerals import read_number

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
GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "psi"),
        "omega",
    )
)
"""Greek letters by the names that sympy prints, which are LaTeX macros, too."""
FORMULA_WORDS = FUNCTIONS | GREEK | {"pi", "oo", "infty", "inf", "or", "and", "cup", "in", "mod"}
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
        "degree": "degree degrees",
        "celsius": "celsius",
        "fahrenheit": "fahrenheit",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "euro": "euro euros eur",
        "": "men",
    }.items()
    for name in names.split()
}


MONEY = {"$": "dollar", "€": "euro", "£": "sterling"}
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
_SCALED = "celsius", "fahrenheit"
"""Kinds of degrees; plain ones may be of either."""


def take_unit(text: str) -> tuple[str, str]:
    """Take a trailing unit off a quantity; before it, work out a word of scale: 3 million dollars.

    A percentage keeps its sign and is of the unit `percent`.
    """
    if re.search(r"\d\s*\\?%$", text):
        return re.sub(r"\s*\\?%$", "%", text), "percent"
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
        return number + "%", "percent"
    if lower[0] in ("degree", "degrees"):
        return number, _unit(" ".join(lower[:2])) or "degree"
    kept = len(words)
    while kept and _is_unit(lower[kept - 1]) and (kept > 1 or gap or lower[0].partition("/")[0] in _UNITS):
        kept -= 1
    if 0 < kept < len(words) and lower[kept - 1] in ("sq", "cu"):
        kept -= 1
    unit = _unit(" ".join(words[kept:]) + (f"^{power}" if power else "")) if kept < len(words) else ""
    value = read_number(number)
    if value and not value.percent and kept and all(map(_scale, lower[:kept])):
        return str(value.value * math.prod(map(_scale, lower[:kept]))), unit
    if kept == len(words):
        return text, ""
    return number + (gap + " ".join(words[:kept]) if kept else ""), unit


def _scale(word: str) -> int:
    """What a word of scale multiplies by; 0 where it is none."""
    return _SCALES.get(word.removesuffix("s"), 0)


def _is_of_number(word: str) -> bool:
    """Whether a word belongs to the number before it, or stands for one: no unit."""
    plain = word.lower().replace(".", "")
    return plain in _NO_UNITS or _scale(plain) > 0 or _PART.fullmatch(plain) is not None


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
    kind = re.fullmatch(r"degrees? ([cf])(?:elsius|ahrenheit)?", words)
    if kind:
        return {"c": "celsius", "f": "fahrenheit"}[kind[1]]
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
    if (a == "degree" and b in _SCALED) or (b == "degree" and a in _SCALED):
        return False
    (base, _, power), (other, _, other_power) = a.partition("^"), b.partition("^")
    return base != other or bool(power and other_power and power != other_power)
