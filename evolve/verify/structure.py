"""An answer's structure: brackets, lists, sets, matrices and unions around single values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from evolve.verify.numerals import read_number

_OPEN, _CLOSE = "([{", ")]}"
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_POINT = re.compile(r"\(?\s*([A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)?\s*=\s*(?=\()")
"""Names of coordinates before their values: (x, y) = (1, 2)."""
NAMED = re.compile(
    r"^\s*([A-Za-z](?:_\{\d+\}|')?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-zA-Z])|\\equiv(?![a-zA-Z])|:)\s*(?=\S)"
)


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


class Tree:
    """An answer's structure: `kind` is one of value, list, set, matrix, union, or the pair of brackets."""

    __slots__ = ("items", "kind", "text")

    def __init__(self, kind: str, items: list[Tree], text: str) -> None:
        self.kind, self.items, self.text = kind, items, text


@lru_cache(maxsize=1 << 12)
def structure(text: str, depth: int = 0) -> Tree:
    """Parse a normal form into brackets, lists and values. `depth` bounds the nesting."""
    text = text.strip()
    value = Tree("value", [], text)
    if depth > 6 or read_number(text):
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
    point = _POINT.match(text)
    if point and encloses(text[point.end() :], "(", ")"):
        names, values = point[1].split(","), split_top(text[point.end() + 1 : -1], [","])
        if len(names) == len(values):
            return Tree(
                "list", [Tree("value", [], f"{n.strip()}={v}") for n, v in zip(names, values, strict=True)], text
            )
    inner = NAMED.match(text)
    if inner and read_number(text[inner.end() :]):
        return value
    if inner and _PLUS_MINUS.search(text):
        body = structure(text[inner.end() :], depth + 1)
        if body.kind == "list":
            return Tree("list", [Tree("value", [], inner[0] + item.text) for item in body.items], text)
    if inner and "\\in" in inner[0]:
        return structure(text[inner.end() :], depth + 1)
    union = split_top(text, ["\\cup", " U "])
    if len(union) > 1:
        return Tree("union", [structure(part, depth + 1) for part in union], text)
    for left, right in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if encloses(text, left, right):
            items = split_top(text[len(left) : -len(right)], [",", ";"])
            if left[-1] == "{":
                return Tree("set", _flatten(items, depth), text)
            if len(items) > 1:
                return Tree(left + right, [structure(item, depth + 1) for item in items], text)
            if left + right == "[]":
                return structure(items[0], depth + 1)
    items = split_top(text, [",", ";", " and ", " or ", "\\text{ and }", "\\text{ or }", "\\text{and}", "\\text{or}"])
    items = [item for item in items if item]
    if len(items) > 1 or (items and _PLUS_MINUS.search(items[0]) and "=" not in items[0]):
        return Tree("list", _flatten(items, depth), text)
    return value


def encloses(text: str, left: str, right: str) -> bool:
    """Whether `text` is in brackets of which the first closes only at its end."""
    if not (text.startswith(left) and text.endswith(right)):
        return False
    depth = 0
    for position, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and char in _CLOSE:
            return position == len(text) - 1
    return False


def _flatten(items: list[str], depth: int) -> list[Tree]:
    """Items of a set or list; `a ± b` stands for two."""
    trees = []
    for item in items:
        if len(_PLUS_MINUS.findall(item)) == 1:
            trees += [structure(_PLUS_MINUS.sub(sign, item), depth + 1) for sign in "+-"]
        elif item:
            trees.append(structure(item, depth + 1))
    return trees


def _matrix(cells: list[list[str]], depth: int, text: str) -> Tree:
    rows = [Tree("row", [structure(cell, depth + 1) for cell in row], "") for row in cells]
    return Tree("matrix", rows, text)
