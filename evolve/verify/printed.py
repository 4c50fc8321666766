r"""What Python prints, in the notation of answers: numpy's arrays, sympy's sets, conditions on one variable."""

from __future__ import annotations

import re

from evolve.verify.structure import encloses, split_top

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_ROW = rf"\[\s*{_NUMBER}(?:\s+{_NUMBER})*\s*\]"
_ARRAY = re.compile(rf"{_ROW}|\[\s*{_ROW}(?:\s*{_ROW})*\s*\]")
_CALL = re.compile(r"(Interval(?:\.(?:open|Lopen|Ropen))?|Union|FiniteSet|Eq)(\(.*\))")
_PLAIN = (
    (re.compile(rf"\b(?:np|numpy)\.\w+\(({_NUMBER})\)|\b(?:Decimal|mpf)\('({_NUMBER})'\)"), r"\1\2"),
    (re.compile(r"(^|[\[(,{] ?)Fraction\((-?\d+), (\d+)\)(?=$|[\]),}])"), r"\1\2/\3"),
    (re.compile(rf"\(({_NUMBER}[-+](?:\d+(?:\.\d*)?|\.\d+))j\)"), r"\1i"),
)
"""Numbers by the names of their types, and complex ones."""
_BRACKETS = {"": "[]", ".open": "()", ".Lopen": "(]", ".Ropen": "[)"}
_WHOLE = {
    "EmptySet": "\\emptyset",
    "EmptySet()": "\\emptyset",
    "set()": "\\emptyset",
    "Reals": "(-\\infty,\\infty)",
    "\\mathbb{R}": "(-\\infty,\\infty)",
}
_OR = (" | ", " or ", "\\text{ or }", "\\text{or}", "\\lor ", "\\vee ")
_AND = (" & ", " and ", "\\text{ and }", "\\text{and}", "\\land ", "\\wedge ")
_RELATION = re.compile(r"<=|>=|<|>|\\leq(?![a-z])|\\geq(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z])|≤|≥")
_LESS, _STRICT = ("<", "<=", "\\leq", "\\lt", "≤"), ("<", ">", "\\lt", "\\gt")


def from_printed(text: str, depth: int = 0) -> str:
    """A number, array, set or equation as Python prints it, in the notation of answers; any other text as it is.

    `depth` bounds the nesting.
    """
    for pattern, plain in _PLAIN if depth == 0 else ():
        text = pattern.sub(plain, text)
    if text in _WHOLE:
        return _WHOLE[text]
    if _ARRAY.fullmatch(text):
        return re.sub(r"(?<=\])\s*(?=\[)|(?<=[\d.])\s+(?=[-+.\d])", ", ", text)
    call = _CALL.fullmatch(text)
    if not call or depth > 4 or not encloses(call[2], "(", ")"):
        return text
    items = split_top(call[2][1:-1], [","])
    if call[1] == "Union":
        return " \\cup ".join(from_printed(item, depth + 1) for item in items)
    if call[1] == "FiniteSet":
        return f"\\{{{', '.join(items)}\\}}"
    if call[1] == "Eq":
        return " = ".join(items) if len(items) == 2 else text
    brackets = _BRACKETS[call[1].removeprefix("Interval")]
    return _interval(brackets[0], items[0], items[1], brackets[1]) if len(items) == 2 else text


def _interval(left: str, low: str, high: str, right: str) -> str:
    """An interval; open where it is unbounded."""
    unbounded = ["oo" in bound or "\\infty" in bound for bound in (low, high)]
    return f"{'(' if unbounded[0] else left}{low},{high}{')' if unbounded[1] else right}"


def has_relation(text: str) -> bool:
    """Whether a text states that something is less than another."""
    return _RELATION.search(text) is not None


def solutions(text: str) -> tuple[str, str] | None:
    """The variable that a condition is on, and the intervals where it holds; None where it is no such condition."""
    if not has_relation(text):
        return None
    names, intervals = set(), []
    for part in split_top(text, _OR):
        bounds: dict[str, tuple[str, str]] = {}
        part = part[1:-1] if encloses(part, "(", ")") else part
        for condition in split_top(part, _AND):
            found = _bounds(condition[1:-1] if encloses(condition, "(", ")") else condition)
            if found is None or bounds.keys() & found[1].keys():
                return None
            names.add(found[0])
            bounds |= found[1]
        left, low = bounds.get("low", ("(", "-\\infty"))
        right, high = bounds.get("high", (")", "\\infty"))
        intervals.append(_interval(left, low, high, right))
    return (names.pop(), " \\cup ".join(intervals)) if len(names) == 1 else None


def _bounds(condition: str) -> tuple[str, dict[str, tuple[str, str]]] | None:
    """The variable of `x < 3`, `3 > x` or `1 < x < 3`, and its bounds: `low` and `high`, each a bracket and a value."""
    sides = [side.strip() for side in _RELATION.split(condition)]
    relations = _RELATION.findall(condition)
    places = [i for i, side in enumerate(sides) if re.fullmatch(r"[A-Za-z](?:_\{\d+\})?", side)]
    if len(sides) == 3 and 1 in places:
        places = [1]
    if len(places) != 1 or len(sides) > 3 or len({relation in _LESS for relation in relations}) != 1:
        return None
    place = places[0]
    found: dict[str, tuple[str, str]] = {}
    for index, side in enumerate(sides):
        if index == place:
            continue
        if abs(index - place) != 1 or not side or re.search(rf"[,;&=]|(?<![A-Za-z\\]){sides[place]}(?![a-z])", side):
            return None
        relation = relations[min(index, place)]
        low = (index < place) == (relation in _LESS)
        found["low" if low else "high"] = (("(" if low else ")") if relation in _STRICT else "[" if low else "]", side)
    return sides[place], found
