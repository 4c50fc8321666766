"""Single formulas, compared by math-verify. May take for ever: called only where it can be killed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from evolve.verify.fingerprints import Exhausted, Fingerprint, apart, fingerprint
from evolve.verify.units import FUNCTIONS, GREEK

_PYTHON = re.compile(
    rf"\*|(?<![A-Za-z\\])(?:{'|'.join(sorted(FUNCTIONS))})\(|\d[eE][-+]?\d|"
    rf"(?<![A-Za-z\\])(?:pi|oo|I|E|{'|'.join(sorted(GREEK))})(?![A-Za-z])"
)
_TOKENS = re.compile(r"\s*(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[A-Za-z]+|\*\*|[-+*/^(),])")
_NAMES = FUNCTIONS | GREEK | {"pi", "oo", "I", "E"}
_RELATION = re.compile(r"\s*(<=|>=|!=|=|<|>)\s*")
_IN_LATEX = {"<=": "\\leq", ">=": "\\geq", "!=": "\\neq"}
_PRIMED = re.compile(r"([A-Za-z])(?:_\{(\w+)\})?(?:'|\^ ?\{?\\prime\}?)")
_APART = re.compile(r"\d (?!\d{3}(?!\d))\d++(?!\s*/)")
"""Two numbers side by side, neither groups of digits nor a mixed number; math-verify adds them up."""


def _python_to_latex(text: str) -> str | None:
    """An expression or relation as sympy prints it, in LaTeX; None when it is not one.

    A logarithm is the natural one, as in Python, and E is Euler's number.
    """
    if "\\" in text or not _PYTHON.search(text):
        return None
    parts = _RELATION.split(text)
    sides = [_side_to_latex(side) for side in parts[::2]]
    signs = [_IN_LATEX.get(sign, sign) for sign in parts[1::2]]
    if None in sides:
        return None
    return " ".join(map(str, [sides[0], *(part for pair in zip(signs, sides[1:], strict=True) for part in pair)]))


def _side_to_latex(text: str) -> str | None:
    """One side of a relation.

    Only numbers, operators, single letters and `_NAMES` get as far as sympy's parser, which evaluates.
    """
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

    letters = {name for name in re.findall(r"[A-Za-z]+", text) if len(name) == 1}
    names = {name: getattr(sympy, name) for name in _NAMES if hasattr(sympy, name)}
    names |= {name: sympy.Symbol(name) for name in letters - _NAMES | GREEK}
    names["lamda"] = sympy.Symbol("lambda")
    try:
        parsed = parse_expr(
            re.sub(r"\blambda\b", "lamda", text).replace("^", "**"),
            local_dict=names,
            transformations=(*standard_transformations, implicit_multiplication),
            evaluate=True,
        )
        return str(sympy.latex(parsed, ln_notation=True, inv_trig_style="full"))
    except (MemoryError, RecursionError) as error:
        raise Exhausted(type(error).__name__) from None
    except Exception:  # Of an unfinished expression, tokenize.TokenError; of others, whatever sympy runs into.
        return None


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, made to tell when it runs out of memory or of stack."""

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RecursionError) as error:
            raise Exhausted(type(error).__name__) from None

    return called


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """The module. It takes any `Exception` of these functions for a formula that it cannot read, or for `unequal`."""
    import math_verify
    from math_verify import grader, parser

    for module, name in ((parser, "latex2sympy"), (grader, "simplify"), (grader, "solve")):
        setattr(module, name, _telling(getattr(module, name)))
    return math_verify


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
    if _APART.search(text):
        return ()
    latex = _python_to_latex(text) or text
    # math-verify sees the imaginary unit only where it stands alone, and no primes.
    latex = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", latex)
    while (primed := _PRIMED.sub(r"\1_{\2prime}", latex)) != latex:
        latex = primed
    return tuple(_math_verify().parse(f"${latex}$", _reading(), parsing_timeout=None))


@lru_cache(maxsize=1 << 10)
def _fingerprint(text: str) -> Fingerprint | None:
    """The fingerprint of a formula's first reading."""
    return fingerprint(next(iter(_parsed(text)), None))


def formulas_equal(a: str, b: str) -> bool:
    """Formulas, compared by math-verify in both directions, after a numerical look that tells most apart.

    What it cannot compare is unequal: the text may be anything.

    Raises:
        Exhausted: out of memory or of stack, so that there is no telling.
    """
    if "%" not in a + b and apart(_fingerprint(a), _fingerprint(b)):
        return False
    golds, answers = list(_parsed(a)), list(_parsed(b))
    if not golds or not answers:
        return False
    verify = _math_verify().verify
    return bool(verify(golds, answers, timeout_seconds=None) or verify(answers, golds, timeout_seconds=None))
