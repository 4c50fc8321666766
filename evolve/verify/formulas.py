"""Single formulas, compared by math-verify. May take for ever: called only where it can be killed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from evolve.verify.notation import FUNCTIONS

_PYTHON = re.compile(rf"\*|(?<![A-Za-z\\])(?:{'|'.join(sorted(FUNCTIONS))})\(|(?<![A-Za-z\\])(?:pi|oo|I)(?![A-Za-z])")
_TOKENS = re.compile(r"\s*(?:\d+(?:\.\d*)?|\.\d+|[A-Za-z]+|\*\*|[-+*/^(),=<>])")
_NAMES = FUNCTIONS | {"pi", "oo", "I", "E"}
_APART = re.compile(r"\d (?!\d{3}(?!\d))\d++(?!\s*/)")
"""Two numbers side by side, neither groups of digits nor a mixed number; math-verify adds them up."""


def _python_to_latex(text: str) -> str | None:
    """An expression as sympy prints it, in LaTeX; None when it is not one.

    Only numbers, operators, single letters and `_NAMES` get as far as sympy's parser, which evaluates.
    """
    if "\\" in text or not _PYTHON.search(text):
        return None
    position = 0
    while position < len(text.rstrip()):
        match = _TOKENS.match(text, position)
        if not match:
            return None
        token = match[0].strip()
        if token.isalpha() and len(token) > 1 and token not in _NAMES:
            return None
        position = match.end()
    import sympy
    from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

    names = {name: sympy.Symbol(name) for name in set(re.findall(r"[A-Za-z]+", text)) if len(name) == 1}
    names |= {name: getattr(sympy, name) for name in _NAMES if hasattr(sympy, name)}
    names.pop("E", None) if "E" not in text else None
    try:
        parsed = parse_expr(
            text.replace("^", "**"),
            local_dict=names,
            transformations=(*standard_transformations, implicit_multiplication),
            evaluate=True,
        )
        return str(sympy.latex(parsed))
    except Exception:  # Of an unfinished expression, tokenize.TokenError; of others, whatever sympy runs into.
        return None


@lru_cache(maxsize=1)
def _reading() -> tuple[Any, ...]:
    """How math-verify reads a formula: as LaTeX, all of it.

    Its defaults also take trailing letters for units (2t is 2), and the last number for what it cannot read.
    """
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    return (LatexExtractionConfig(normalization_config=normalization),)


@lru_cache(maxsize=1 << 10)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a formula: expressions, then the text itself."""
    import math_verify

    if _APART.search(text):
        return ()
    # math-verify sees the imaginary unit only where it stands alone.
    latex = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", _python_to_latex(text) or text)
    return tuple(math_verify.parse(f"${latex}$", _reading(), parsing_timeout=None))


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
        except Exception:
            return None
        return value if value == value and abs(value) < 1e300 else None
    return None


def formulas_equal(a: str, b: str) -> bool:
    """Formulas, compared by math-verify in both directions, after a numerical look that tells most apart.

    What it cannot compare is unequal: the text may be anything.
    """
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
