"""Whether two answers are equal.

`equiv` is symmetric and deterministic. It can hang (a power tower, a hard simplification), so that
production code calls it only inside the verifier's killable children (`SandboxVerifier.grade`).
Structure (lists, sets, tuples, intervals, matrices) is compared here; single values by `numerals` where
they are plain numbers, else by `formulas`. No answer is ever evaluated as code beyond a white-listed
arithmetic notation.

This file and those it imports also run inside the sandbox (`zygote.as_package`): they import nothing else
of the project.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evolve.verify.formulas import formulas_equal
from evolve.verify.notation import WORDS, normalise
from evolve.verify.numerals import group_by, numbers_equal, quick_equiv, read_number
from evolve.verify.printed import has_relation, solutions
from evolve.verify.structure import NAMED, Tree, structure
from evolve.verify.units import FORMULA_WORDS, take_unit, units_differ

_CHOICE = re.compile(r"\(([A-Z])\)|(?:[Oo]ption|[Cc]hoice) \(?([A-Za-z])\)?")
_LABELLED = re.compile(r"\(([A-Z])\) (?![A-Z]\b)(?:[\w.]|\\(?:frac|sqrt|pi)).*")
"""A choice with what it says."""
_RESIDUE = re.compile(r"(.+?)\s*(?:\\p?mod|\(?(?<![A-Za-z\\])mod)(?![A-Za-z])(.+)")
r"""A residue class: 2 \pmod 5."""
_UNORDERED = frozenset({"list", "set"})


def _match(a: list[Tree], b: list[Tree], ordered: bool) -> bool:
    """Whether items pair off as equals.

    Where order counts, items that are all named go by their names.
    """
    if ordered and (_names(a) or _names(b)):
        if _names(a) and _names(b):
            return _match(a, b, ordered=False)
        first, second = _in_order(a), _in_order(b)
        return first is not None and second is not None and _match(_bodies(first), _bodies(second), ordered=True)
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


def _names(items: list[Tree]) -> list[str]:
    """The names of items that all have one, as `x=1` has; else none."""
    found = [NAMED.match(item.text) if item.kind == "value" else None for item in items]
    return [match[1] for match in found if match] if all(found) else []


def _in_order(items: list[Tree]) -> list[Tree] | None:
    """Items in the order of a tuple, by names that follow each other in the alphabet.

    None: by their names they have no order of which a tuple's reader could know.
    """
    names = _names(items)
    if not names:
        return items
    parts = [re.fullmatch(r"([A-Za-z])(?:_\{(\d+)\})?", name) for name in names]
    indexed = len({part and part[1] for part in parts}) == 1
    ranks = [int((part[2] if indexed else ord(part[1])) or 0) if part else -1 for part in parts]
    if sorted(ranks) != list(range(min(ranks), min(ranks) + len(ranks))):
        return None
    return [item for _, item in sorted(zip(ranks, items, strict=True), key=lambda pair: pair[0])]


def _bodies(items: list[Tree]) -> list[Tree]:
    """What named items say of their names; others as they are."""
    return [structure(NAMED.sub("", item.text)) if item.kind == "value" else item for item in items]


def _distinct(items: list[Tree]) -> list[Tree]:
    """A set's members once each."""
    kept: list[Tree] = []
    for item in items:
        if not any(_equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _equal(a: Tree, b: Tree) -> bool:
    if a.kind == b.kind == "value":
        return _values_equal(a.text, b.text)
    if a.kind == b.kind and a.kind not in ("value", "set"):
        return _match(a.items, b.items, a.kind not in ("list", "union"))
    kinds = {a.kind, b.kind}
    if kinds <= _UNORDERED:
        return _match(_distinct(a.items), _distinct(b.items), ordered=False)
    if "list" in kinds and "()" in kinds:
        return _match(a.items, b.items, ordered=True)
    if kinds == {"[]", "()"} and len(a.items) != 2:  # Two might be an interval's ends.
        return _match(a.items, b.items, ordered=True)
    if "[]" in kinds and kinds & _UNORDERED:
        return _match(a.items, b.items, ordered=False)
    if "matrix" in kinds and kinds & {"()", "[]", "list"}:
        matrix, other = (a, b) if a.kind == "matrix" else (b, a)
        cells = [cell for row in matrix.items for cell in row.items]
        if all(item.kind in ("()", "[]") for item in other.items):
            rows = zip(matrix.items, other.items, strict=False)
            return len(matrix.items) == len(other.items) and all(_match(x.items, y.items, True) for x, y in rows)
        flat = len(matrix.items) == 1 or all(len(row.items) == 1 for row in matrix.items)
        return flat and _match(cells, other.items, ordered=True)
    for one, other in ((a, b), (b, a)):
        if one.kind in _UNORDERED and len(one.items) == 1 and other.kind == "value":
            return _equal(one.items[0], other)
    if "value" in kinds:
        return formulas_equal(a.text, b.text)
    return False


def _values_equal(a: str, b: str) -> bool:
    """Single values: numbers, choices, words, numerals in a base, assignments, expressions; each may have a unit."""
    (a, one), (b, other) = take_unit(a), take_unit(b)
    if units_differ(one, other):
        return False
    first, second = read_number(a), read_number(b)
    if first and second:
        return numbers_equal(first, second)
    if a.replace(" ", "") == b.replace(" ", ""):
        return bool(a)
    names = [NAMED.match(text) for text in (a, b)]
    if any(names):
        bodies = [text[m.end() :] if m else text for text, m in zip((a, b), names, strict=True)]
        if all(names):
            labels = [m[1].partition("(")[0] for m in names if m]
            return labels[0] == labels[1] and equiv(bodies[0], bodies[1])
        if "=" not in bodies[0] + bodies[1]:
            return equiv(bodies[0], bodies[1])
    chosen = _same_choice(a, b)
    if chosen is not None:
        return chosen
    words = [_words(text) for text in (a, b)]
    if None in words and ("E" in (a, b) or _is_product(a, b)):  # E: a choice, and Euler's number as sympy prints it.
        return formulas_equal(a, b)
    if words[0] is not None or words[1] is not None:
        return words[0] == words[1]
    classes = [_RESIDUE.fullmatch(text) for text in (a, b)]
    if any(classes):
        parts = [[part.strip(" {}()") for part in m.groups()] for m in classes if m]
        return all(classes) and equiv(parts[0][0], parts[1][0]) and equiv(parts[0][1], parts[1][1])
    bases = [re.fullmatch(r"(-?[\dA-Z]+)_\{(\d+)\}", text) for text in (a, b)]
    if any(bases):
        digits = [m[1] if m else text for text, m in zip((a, b), bases, strict=True)]
        return digits[0] == digits[1] and (not all(bases) or bases[0][2] == bases[1][2])  # type: ignore[index]
    return formulas_equal(a, b)


def _is_product(a: str, b: str) -> bool:
    """Whether one of two texts is a product of letters with signs between them, and so may be the other without."""
    return any(re.fullmatch(r"[A-Za-z](?: ?(?:\*|\\cdot|\\times) ?[A-Za-z])+", text) for text in (a, b))


def _same_choice(a: str, b: str) -> bool | None:
    """Whether two answers choose the same letter; None: neither says that it is a choice ((C), (C) 5, Option C)."""
    plain = [re.sub(r"\s+", " ", re.sub(WORDS, r" \1 ", text)).strip().strip(".:").rstrip() for text in (a, b)]
    told = [_CHOICE.fullmatch(text) for text in plain]
    labelled = [_LABELLED.fullmatch(text) for text in plain]
    letters = [
        (m or n or re.fullmatch(r"\(?([A-Z])\)?|\(([a-z])\)", text))
        for m, n, text in zip(told, labelled, plain, strict=True)
    ]
    if not any(told + labelled) or all(labelled) or not all(letters):
        return None
    first, second = ("".join(m.groups("")).upper() for m in letters if m)
    return first == second


def _words(text: str) -> str | None:
    """The words of an answer that is no formula (a name, a choice such as (C)), lower case; else None."""
    plain = re.sub(WORDS, r" \1 ", text)
    macro = plain != text
    plain = re.sub(r"\s+", " ", plain).strip().strip(".:")
    choice = re.fullmatch(r"\(?([A-Z])\)?", plain)
    if choice:
        return choice[1].lower() if macro or plain != choice[1] or plain in "ABCDE" else None
    letters = re.fullmatch(r"[A-Za-z][A-Za-z '\-]*", plain)
    if letters and not FORMULA_WORDS & set(plain.lower().split()) and (macro or re.search("[A-Za-z]{3}", plain)):
        return plain.lower()
    return None


def equiv(a: str, b: str) -> bool:
    """Whether two answers are equal. Symmetric. May take for ever: call it where it can be killed.

    Raises:
        Exhausted: out of memory or of stack, so that there is no telling.
    """
    quick = quick_equiv(a, b)
    if quick is not None:
        return quick
    (first, one), (second, other) = normalise(a), normalise(b)
    if units_differ(one, other):
        return False
    if first == second:
        return bool(first)
    if not first or not second:
        return False
    solved = [solutions(text) for text in (first, second)]
    if solved[0] and solved[1]:
        return solved[0][0] == solved[1][0] and _equal(structure(solved[0][1]), structure(solved[1][1]))
    if solved[0] and not has_relation(second):
        first = solved[0][1]
    elif solved[1] and not has_relation(first):
        second = solved[1][1]
    return _equal(structure(first), structure(second))


def group(answers: Sequence[str]) -> list[int]:
    """For each answer the index of the first of its group, which no order of the answers changes (see `group_by`)."""
    return group_by(answers, equiv)[0]


def warm_up() -> None:
    """Load and compile what comparisons need."""
    equiv("\\frac{\\sqrt{3}}{2} + x", "sqrt(3)/2 + x")
    equiv("x^2 - 1 = 0", "(x-1)(x+1) = 0")
    equiv("\\begin{pmatrix} 1 \\\\ \\pi \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\pi \\end{pmatrix}")
