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
    """`values`: of an expression, of a set's or tuple's members, or a relation's right side; none of an infinite set.

    `ratios`: of a relation between polynomials.
    """

    relation: bool
    values: tuple[complex, ...] | None
    ratios: tuple[complex, ...] | None = None


def fingerprint(parsed: Any) -> Fingerprint | None:
    """The fingerprint of what math-verify reads in a formula; None: it has none."""
    import sympy

    try:
        if isinstance(parsed, sympy.Expr | sympy.FiniteSet | sympy.Tuple):
            return Fingerprint(False, _values(parsed))
        if isinstance(parsed, sympy.Interval | sympy.Union):
            return Fingerprint(False, ())
        if isinstance(parsed, sympy.core.relational.Relational):
            simple = isinstance(parsed.rhs, sympy.Expr)
            return Fingerprint(True, _values(parsed.rhs), _ratios(parsed.lhs - parsed.rhs) if simple else None)
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
    if a.values is None or b.values is None:
        return False
    if not a.values or not b.values:
        return not (a.relation or b.relation) and 1 in (len(a.values), len(b.values))
    return any(
        all(_differ(x, y) for y in others)
        for some, others in ((a.values, b.values), (b.values, a.values))
        for x in some
    )


def _differ(x: complex, y: complex) -> bool:
    return abs(x - y) > TOLERANCE * max(abs(x), abs(y))


def _values(parsed: Any) -> tuple[complex, ...] | None:
    """The values of an expression or of the members of a set or tuple; None where one has none."""
    import sympy

    members = [parsed] if isinstance(parsed, sympy.Expr) else list(parsed.args)
    if not members or not all(isinstance(member, sympy.Expr) for member in members):
        return None
    found = [_value(member, 0) for member in members]
    return None if None in found else tuple(value for value in found if value is not None)


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
