"""Whether two answers are equal, and what answer a text states.

`equiv` is symmetric and deterministic. It can hang (a power tower, a hard simplification), so that
production code calls it only inside the verifier's killable children (`SandboxVerifier.grade`);
`quick_equiv` and `extract_answer` are bounded and may be called anywhere. Structure (lists, sets, tuples,
intervals, matrices) is compared here; single values by math-verify. No answer is ever evaluated as code
beyond a white-listed arithmetic notation.

This file also runs inside the sandbox, by path: it imports nothing of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

LONGEST = 2000
"""Characters of an answer beyond which only identical texts are equal."""

RELATIVE = Fraction(2, 10**6)
ABSOLUTE = Fraction(5, 10**7)
"""A decimal stands for a value when it differs by at most both of these: 0.333333 for 1/3, and
57.99999999999999 for 58, but not 1.2e-7 for 0."""

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<whole>\d{1,60})(?P<part>\.\d{0,60})?|(?P<only>\.\d{1,60})|"
    r"(?P<thousands>\d{1,3}(?:,\d{3}){1,19})(?P<tpart>\.\d{0,60})?"
    r")(?:[eE](?P<exponent>[+-]?\d{1,3}))?(?P<percent>\\?%)?"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>\d{1,30})(?: +(?=\d)|(?=\\frac)))?"
    r"(?:\\frac\{(?P<tsign>[+-]?)(?P<top>\d{1,60})\}\{(?P<bottom>\d{1,60})\}|"
    r"(?P<ptop>\d{1,60})/(?P<pbottom>\d{1,60}))"
)


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


# --------------------------------------------------------------------------- plain numbers


class _Value:
    """A plain number: its value, whether it was written as a decimal, whether as a percentage."""

    __slots__ = ("decimal", "percent", "value")

    def __init__(self, value: Fraction, decimal: bool, percent: bool) -> None:
        self.value, self.decimal, self.percent = value, decimal, percent


@lru_cache(maxsize=1 << 14)
def _plain(text: str) -> _Value | None:
    """`text` as a plain number (integer, decimal, scientific, fraction, mixed number), if it is one."""
    if len(text) > 200:
        return None
    match = _NUMBER.fullmatch(text)
    if match:
        if match["thousands"]:
            digits = match["thousands"].replace(",", "") + (match["tpart"] or "")
        else:
            digits = (match["whole"] or "") + (match["part"] or match["only"] or "")
        exponent = int(match["exponent"] or 0)
        value = Fraction(match["sign"] + digits.rstrip(".")) * Fraction(10) ** exponent
        return _Value(value, "." in digits or match["exponent"] is not None, match["percent"] is not None)
    match = _RATIO.fullmatch(text)
    if match:
        bottom = int(match["bottom"] or match["pbottom"])
        if bottom == 0:
            return None
        value = Fraction(int(match["top"] or match["ptop"]), bottom)
        if match["tsign"] == "-":
            value = -value
        if match["whole"]:
            if match["tsign"] or value >= 1:
                return None
            value += int(match["whole"])
        return _Value(-value if match["sign"] == "-" else value, False, False)
    return None


def _close(a: Fraction, b: Fraction, decimal: bool) -> bool:
    if a == b:
        return True
    difference = abs(a - b)
    return decimal and difference <= ABSOLUTE and difference <= RELATIVE * max(abs(a), abs(b))


def _plain_equal(a: _Value, b: _Value) -> bool:
    """Equal as numbers; a percentage also equals its bare number (as a unit) and its hundredth."""
    decimal = a.decimal or b.decimal
    if _close(a.value, b.value, decimal):
        return True
    if a.percent and not b.percent:
        return _close(a.value / 100, b.value, decimal)
    if b.percent and not a.percent:
        return _close(a.value, b.value / 100, decimal)
    return False


def quick_equiv(a: str, b: str) -> bool | None:
    """Equality where it can be told exactly and at once: identical texts, plain numbers. Else None."""
    a, b = a.strip(), b.strip()
    if a == b:
        return bool(a)
    if not a or not b or len(a) > LONGEST or len(b) > LONGEST:
        return False
    first, second = _plain(a), _plain(b)
    return _plain_equal(first, second) if first and second else None


def quick_group(answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Group by what `quick_equiv` can tell: for each answer its group's first index, and those indices."""
    return _group(answers, quick_equiv)


def _group(answers: Sequence[str], equal: Callable[[str, str], bool | None]) -> tuple[list[int], list[int]]:
    """For each answer the index of the first answer `equal` to it, and those indices."""
    firsts: list[int] = []
    found: list[int] = []
    for index, answer in enumerate(answers):
        first = next((i for i in firsts if equal(answers[i], answer)), index)
        if first == index:
            firsts.append(index)
        found.append(first)
    return found, firsts


# --------------------------------------------------------------------------- normal form

_WORDS = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
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
_NAMES = frozenset(
    [
        "pi",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "oo",
        "infty",
        "or",
        "and",
        "cup",
        "in",
        "mod",
        "inf",
    ]
)

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
    text = re.sub(r",\\!\s*", ",", text)
    text = _SPACES.sub(" ", text)
    text = _FENCES.sub("", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"_\{(\d+)\}", r"_\1", text)
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
        if words[0].rstrip(".") in _NAMES or any(w in _NAMES for w in words):
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


def _units_differ(a: str, b: str) -> bool:
    """Whether two units cannot be the same; an unknown unit or power can be any."""
    if not a or not b:
        return False
    (base, _, power), (other, _, other_power) = a.partition("^"), b.partition("^")
    return base != other or bool(power and other_power and power != other_power)


# --------------------------------------------------------------------------- structure

_OPEN, _CLOSE = "([{", ")]}"
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_PREFIX = re.compile(r"^\s*([A-Za-z](?:_\d|')?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-zA-Z])|:)\s*(?=\S)")


def split_top(text: str, separators: Sequence[str]) -> list[str]:
    """Split at separators that are inside no bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        char = text[position]
        if char == "\\" and text[position + 1 : position + 2] in ("{", "}"):
            depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        if depth <= 0:
            for separator in separators:
                if text.startswith(separator, position):
                    parts.append(text[start:position])
                    position += len(separator)
                    start = position
                    break
            else:
                position += 1
            continue
        position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


class _Tree:
    """An answer's structure: `kind` is one of value, list, set, matrix, union, or the pair of brackets."""

    __slots__ = ("items", "kind", "text")

    def __init__(self, kind: str, items: list[_Tree], text: str) -> None:
        self.kind, self.items, self.text = kind, items, text


@lru_cache(maxsize=1 << 12)
def structure(text: str, depth: int = 0) -> _Tree:
    """Parse a normal form into brackets, lists and values. `depth` bounds the nesting."""
    text = text.strip()
    value = _Tree("value", [], text)
    if depth > 6 or _plain(text):
        return value
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return _matrix([[cell.strip() for cell in row.split("&")] for row in rows], depth, text)
    printed = re.fullmatch(r"(?:Matrix|array)\((\[.*\])\)|(\[\s*\[.*\]\s*\])", text)
    if printed:
        body = (printed[1] or printed[2]).strip()[1:-1]
        rows = [row for row in split_top(body, [","]) if row]
        cells = [split_top(row[1:-1] if row.startswith("[") else row, [","]) for row in rows]
        return _matrix(cells, depth, text)
    inner = _PREFIX.match(text)
    if inner and _plain(text[inner.end() :]):
        return value
    if inner and "\\in" in inner[0]:
        return structure(text[inner.end() :], depth + 1)
    union = split_top(text, ["\\cup", " U "])
    if len(union) > 1:
        return _Tree("union", [structure(part, depth + 1) for part in union], text)
    for left, right in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(left) and text.endswith(right) and _encloses(text, left, right):
            items = split_top(text[len(left) : -len(right)], [",", ";"])
            if left[-1] == "{":
                return _Tree("set", _flatten(items, depth), text)
            if len(items) > 1:
                return _Tree(left + right, [structure(item, depth + 1) for item in items], text)
            if left + right == "[]":
                return structure(items[0], depth + 1)
    items = split_top(text, [",", ";", " and ", " or ", "\\text{ and }", "\\text{ or }", "\\text{and}", "\\text{or}"])
    items = [item for item in items if item]
    if len(items) > 1 or (items and "\\pm" in items[0] and "=" not in items[0]):
        return _Tree("list", _flatten(items, depth), text)
    return value


def _encloses(text: str, left: str, right: str) -> bool:
    """Whether the first bracket of `text` closes only at its end."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and char in _CLOSE:
            return position == len(text) - 1
    return False


def _flatten(items: list[str], depth: int) -> list[_Tree]:
    """Items of a set or list; `a ± b` stands for two."""
    trees = []
    for item in items:
        if item and "\\pm" in item and item.count("\\pm") == 1:
            trees += [structure(item.replace("\\pm", sign), depth + 1) for sign in "+-"]
        elif item:
            trees.append(structure(item, depth + 1))
    return trees


def _matrix(cells: list[list[str]], depth: int, text: str) -> _Tree:
    rows = [_Tree("row", [structure(cell, depth + 1) for cell in row], "") for row in cells]
    return _Tree("matrix", rows, text)


# --------------------------------------------------------------------------- comparison

_UNORDERED = frozenset({"list", "set"})


def _match(a: list[_Tree], b: list[_Tree], ordered: bool) -> bool:
    """Whether items pair off as equals."""
    if len(a) != len(b) or len(a) > 64:
        return False
    if ordered:
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    rest = list(b)
    for item in a:
        for index, other in enumerate(rest):
            if _equal(item, other):
                del rest[index]
                break
        else:
            return False
    return True


def _distinct(items: list[_Tree]) -> list[_Tree]:
    """A set's members once each."""
    kept: list[_Tree] = []
    for item in items:
        if not any(_equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _equal(a: _Tree, b: _Tree) -> bool:
    if a.kind == b.kind == "value":
        return _values_equal(a.text, b.text)
    if a.kind == b.kind and a.kind not in ("value", "set"):
        return _match(a.items, b.items, a.kind not in ("list", "union"))
    kinds = {a.kind, b.kind}
    if kinds <= _UNORDERED:
        return _match(_distinct(a.items), _distinct(b.items), ordered=False)
    if "list" in kinds and "()" in kinds:
        return _match(a.items, b.items, ordered=True)
    if "[]" in kinds and kinds & _UNORDERED:
        return _match(a.items, b.items, ordered=False)
    if "matrix" in kinds and kinds & {"()", "[]", "list"}:
        matrix, other = (a, b) if a.kind == "matrix" else (b, a)
        cells = [cell for row in matrix.items for cell in row.items]
        flat = len(matrix.items) == 1 or all(len(row.items) == 1 for row in matrix.items)
        return flat and _match(cells, other.items, ordered=True)
    for one, other in ((a, b), (b, a)):
        if one.kind in _UNORDERED and len(one.items) == 1 and other.kind == "value":
            return _equal(one.items[0], other)
    if "value" in kinds:
        return _symbolic_equal(a.text, b.text)
    return False


def _values_equal(a: str, b: str) -> bool:
    """Single values: numbers, choices, words, numerals in a base, assignments, expressions."""
    first, second = _plain(a), _plain(b)
    if first and second:
        return _plain_equal(first, second)
    if a.replace(" ", "") == b.replace(" ", ""):
        return bool(a)
    names = [_PREFIX.match(text) for text in (a, b)]
    if any(names):
        bodies = [text[m.end() :] if m else text for text, m in zip((a, b), names, strict=True)]
        if all(names):
            labels = [m[1].partition("(")[0] for m in names if m]
            return labels[0] == labels[1] and equiv(bodies[0], bodies[1])
        if "=" not in bodies[0] + bodies[1]:
            return equiv(bodies[0], bodies[1])
    words = [_words(text) for text in (a, b)]
    if words[0] is not None or words[1] is not None:
        return words[0] == words[1]
    bases = [re.fullmatch(r"(-?[\dA-Z]+)_(\d+)", text) for text in (a, b)]
    if any(bases):
        digits = [m[1] if m else text for text, m in zip((a, b), bases, strict=True)]
        return digits[0] == digits[1] and (not all(bases) or bases[0][2] == bases[1][2])  # type: ignore[index]
    return _symbolic_equal(a, b)


def _words(text: str) -> str | None:
    """The words of an answer that is no formula (a name, a choice such as (C)), lower case; else None."""
    plain = re.sub(_WORDS, r" \1 ", text)
    macro = plain != text
    plain = re.sub(r"\s+", " ", plain).strip().strip(".:")
    choice = re.fullmatch(r"\(?([A-Z])\)?", plain)
    if choice:
        return choice[1].lower() if macro or plain != choice[1] or plain in "ABCDE" else None
    letters = re.fullmatch(r"[A-Za-z][A-Za-z '\-]*", plain)
    if letters and not _NAMES & set(plain.lower().split()) and (macro or re.search("[A-Za-z]{3}", plain)):
        return plain.lower()
    return None


_PYTHON = re.compile(
    r"\*|(?<![A-Za-z\\])(?:sqrt|sin|cos|tan|log|exp|Rational|factorial|Abs)\(|(?<![A-Za-z\\])(?:pi|oo|I)(?![A-Za-z])"
)
_TOKENS = re.compile(r"\s*(?:\d+(?:\.\d*)?|\.\d+|[A-Za-z]+|\*\*|[-+*/^(),=<>])")
_CALLS = frozenset(
    [
        "sqrt",
        "cbrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "log",
        "ln",
        "exp",
        "Rational",
        "factorial",
        "Abs",
        "pi",
        "oo",
        "I",
        "E",
    ]
)


def _python_to_latex(text: str) -> str | None:
    """An expression as sympy prints it, in LaTeX; None when it is not one.

    Only numbers, operators, single letters and `_CALLS` get as far as sympy's parser, which evaluates.
    """
    if "\\" in text or not _PYTHON.search(text):
        return None
    position = 0
    while position < len(text.rstrip()):
        match = _TOKENS.match(text, position)
        if not match:
            return None
        token = match[0].strip()
        if token.isalpha() and len(token) > 1 and token not in _CALLS:
            return None
        position = match.end()
    import sympy
    from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

    names = {name: sympy.Symbol(name) for name in set(re.findall(r"[A-Za-z]+", text)) if len(name) == 1}
    names |= {name: getattr(sympy, name) for name in _CALLS if hasattr(sympy, name)}
    names.pop("E", None) if "E" not in text else None
    try:
        parsed = parse_expr(
            text.replace("^", "**"),
            local_dict=names,
            transformations=(*standard_transformations, implicit_multiplication),
            evaluate=True,
        )
        return str(sympy.latex(parsed))
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError):
        return None


@lru_cache(maxsize=1 << 10)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a formula: expressions, then the text itself."""
    import math_verify

    # math-verify sees the imaginary unit only where it stands alone.
    latex = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", _python_to_latex(text) or text)
    return tuple(math_verify.parse(f"${latex}$", parsing_timeout=None))


@lru_cache(maxsize=1 << 10)
def _fingerprint(text: str) -> complex | None:
    """A formula's value with its variables at fixed odd points; None when it has no finite value."""
    import sympy

    for parsed in _parsed(text):
        if not isinstance(parsed, sympy.Expr):
            continue
        points = {
            symbol: sympy.Rational(sum(map(ord, symbol.name)) * 37 % 101 + 7, 53) for symbol in parsed.free_symbols
        }
        try:
            value = complex(parsed.subs(points).evalf(15))
        except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
            return None
        return value if value == value and abs(value) < 1e300 else None
    return None


def _symbolic_equal(a: str, b: str) -> bool:
    """Formulas, compared by math-verify in both directions, after a numerical look that tells most apart."""
    import math_verify

    first, second = _fingerprint(a), _fingerprint(b)
    comparable = first is not None and second is not None and "%" not in a + b
    if comparable and abs(first - second) > 1e-5 * max(abs(first), abs(second)):  # type: ignore[operator,arg-type]
        return False
    golds, answers = list(_parsed(a)), list(_parsed(b))
    if not golds or not answers:
        return False
    return bool(
        math_verify.verify(golds, answers, timeout_seconds=None)
        or math_verify.verify(answers, golds, timeout_seconds=None)
    )


def equiv(a: str, b: str) -> bool:
    """Whether two answers are equal. Symmetric. May take for ever: call it where it can be killed."""
    quick = quick_equiv(a, b)
    if quick is not None:
        return quick
    (first, one), (second, other) = normalise(a), normalise(b)
    if _units_differ(one, other):
        return False
    if first == second:
        return bool(first)
    if not first or not second:
        return False
    return _equal(structure(first), structure(second))


def group(answers: Sequence[str]) -> list[int]:
    """For each answer the index of the first answer equal to it."""
    return _group(answers, equiv)[0]


def warm_up() -> None:
    """Load and compile what comparisons need."""
    equiv("\\frac{\\sqrt{3}}{2} + x", "sqrt(3)/2 + x")
    equiv("x^2 - 1 = 0", "(x-1)(x+1) = 0")
    equiv("\\begin{pmatrix} 1 \\\\ \\pi \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\pi \\end{pmatrix}")
