"""What tells most formulas apart at once: their values, with their variables at fixed odd points.

Formulas of different fingerprints are different; those of equal ones need not be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-5
LARGEST_POWER = 16
"""Powers up to which an equation is multiplied out."""


class Exhausted(BaseException):
    """A comparison ran out of memory or of stack, and so is none. No `Exception`: math-verify takes those for `no`."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`value`: of an expression, or of a relation's right side. `ratios`: of a relation between polynomials."""

    relation: bool
    value: complex | None
    ratios: tuple[complex, ...] | None = None


def fingerprint(parsed: Any) -> Fingerprint | None:
    """The fingerprint of what math-verify reads in a formula; None: it has none."""
    import sympy

    try:
        if isinstance(parsed, sympy.Expr):
            return Fingerprint(False, _value(parsed, 0))
        if isinstance(parsed, sympy.core.relational.Relational):
            return Fingerprint(True, _value(parsed.rhs, 0), _ratios(parsed.lhs - parsed.rhs))
    except (MemoryError, RecursionError) as error:
        raise Exhausted(type(error).__name__) from None
    except Exception:  # Whatever sympy runs into: a text may be read as anything.
        return None
    return None


def apart(a: Fingerprint | None, b: Fingerprint | None) -> bool:
    """Whether two formulas are known to be different.

    Beside an expression a relation stands for its right side, as `AB = 5` does for 5.
    """
    if a is None or b is None:
        return False
    if a.relation and b.relation:
        if a.ratios is None or b.ratios is None:
            return False
        return any(_differ(x, y) for x, y in zip(a.ratios, b.ratios, strict=True))
    return a.value is not None and b.value is not None and _differ(a.value, b.value)


def _differ(x: complex, y: complex) -> bool:
    return abs(x - y) > TOLERANCE * max(abs(x), abs(y))


def _value(expression: Any, trial: int) -> complex | None:
    """The value at the `trial`-th point; None where it is not finite."""
    import sympy

    points = {
        symbol: sympy.Rational((sum(map(ord, symbol.name)) * (37 + 24 * trial) + 11 * trial) % 101 + 7, 53)
        for symbol in expression.free_symbols
    }
    value = complex(expression.subs(points).evalf(15))
    return value if value == value and abs(value) < 1e300 else None


def _ratios(difference: Any) -> tuple[complex, ...] | None:
    """What the sides of an equation differ by, at two points in units of that at a third.

    An equation is the same after both sides are multiplied by a number or by a common denominator, and where a factor
    is repeated: of the numerator, every factor counts once. None: it is no polynomial, or one too large.
    """
    import sympy

    powers = [power.exp for power in difference.atoms(sympy.Pow)]
    if not all(power.is_Integer and abs(power) <= LARGEST_POWER for power in powers):
        return None
    polynomial = sympy.Poly(sympy.fraction(sympy.together(difference.doit()))[0])
    if not all(generator.is_Symbol for generator in polynomial.gens):
        return None
    plain = polynomial.sqf_part().as_expr()
    first, second, third = (_value(plain, trial) for trial in range(3))
    if not first or second is None or third is None:
        return None
    return second / first, third / first
