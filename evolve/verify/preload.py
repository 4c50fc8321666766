"""What an interpreter server of each kind has loaded, warmed up and laid out before it forks its first node."""

from __future__ import annotations

import os
import sys
from typing import Any

LIGHT = ("abc", "collections", "copy", "enum", "functools", "io", "itertools", "numbers", "operator", "re")
"""Modules a light interpreter has loaded: those that map no extension module, since every mapping
makes each fork dearer."""

SYMBOLIC = (
    *LIGHT,
    *("bisect", "calendar", "cmath", "contextlib", "dataclasses", "datetime", "decimal", "fractions", "heapq", "json"),
    *("math", "random", "statistics", "string", "textwrap", "time", "types", "typing", "mpmath", "sympy"),
)
"""Modules a symbolic interpreter has loaded: numpy alone would map a hundred more pieces of extension modules."""

FULL = (*SYMBOLIC, "array", "csv", "secrets", "unicodedata", "numpy")

UNNEEDED = ("_hashlib", "bz2", "lzma")
"""Modules that others load where they can and do without: they map large libraries. Code may still import them."""


def preload(kind: str) -> None:
    """Import and warm up what a server of this kind offers."""
    import importlib

    # Hooks run at every fork: `random` would reseed itself in each child, so that siblings would
    # not share their parent's random state. There are no threads here, whose locks need others.
    os.register_at_fork = lambda **hooks: None
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(UNNEEDED))
    for name in {"light": LIGHT, "full": FULL}.get(kind, SYMBOLIC):
        importlib.import_module(name)
    for name in (*UNNEEDED, "hashlib", "hmac", "secrets", "shutil"):
        modules.pop(name, None)
    if kind == "light":
        return
    warm_up()
    if kind == "full":
        warm_up_numpy()
    if kind == "grade":
        from evolve.verify import grading

        grading.warm_up()
    modules["random"].seed(0)


def warm_up() -> None:
    """Make the sympy calls that steps make, so that what they load and cache is shared and not made in each node."""
    names: dict[str, Any] = {}
    exec("from sympy import *\nx, y, z = symbols('x y z')\nn = symbols('n', integer=True, positive=True)", names)
    for code in (
        "solve(x**2 - 5*x + 6, x), solve(x**2 - 2, x), solve(x**3 - 6*x**2 + 11*x - 6, x), solve(3*x - 7, x)",
        "solve([2*x + y - 7, x - 3*y], [x, y]), solve(Eq(2*x + 1, 5), x), solveset(x**2 - 4, x, S.Reals)",
        "solve(x**2 + y**2 - 25, y), solve(x**2 - 3*x + 1 < 0, x), roots(x**2 - x - 1), nsolve(x**2 - 2, 1)",
        "expand((2*x - 1)**2*(x + 4)), factor(x**3 - 1), simplify((x**2 - 1)/(x - 1)), together(1/x + 1/y)",
        "(x**3 - 3*x + 2).subs(x, Rational(1, 2) + sqrt(3)/2), apart(1/(x**2 - 1)), radsimp(1/sqrt(2))",
        "diff(sin(x)*exp(x), x), diff(x**3 - 2*x, x), limit(sin(x)/x, x, 0), series(exp(x), x, 0, 4)",
        "integrate(x**2 + 1, x), integrate(x**3 - 2*x, (x, 0, 2)), integrate(sin(x), (x, 0, pi)), integrate(1/x, x)",
        "integrate(x**4 - 3*x + 2, (x, 1, 3)), integrate(x*exp(x), x), integrate(1/(x**2 + 1), x)",
        "summation(n, (n, 1, 10)), summation(z**2, (z, 1, n)), binomial(10, 3), factorial(6), gcd(12, 18), lcm(4, 6)",
        "factorint(360), divisors(36), isprime(97), primerange(2, 30), totient(36), Mod(17, 5), igcd(4, 6)",
        "simplify(sin(x)**2 + cos(x)**2), trigsimp(2*sin(x)*cos(x)), cos(pi/3), atan(1), sqrt(8), log(8, 2)",
        "Matrix([[1, 2], [3, 4]]).det(), Matrix([[2, 1], [1, 3]]).inv(), Matrix([[2, 0], [0, 3]]).eigenvals()",
        "str(sqrt(8)/3 + pi*I), repr(x**2/3 - 1), Rational(1, 3).evalf(), N(pi, 10), float(sqrt(2)), int(Integer(3))",
        "Point(0, 0).distance(Point(3, 4)), nsimplify(0.5), Poly(x**2 + 1, x).all_coeffs(), floor(Rational(7, 2))",
    ):
        eval(code, names)


def warm_up_numpy() -> None:
    """The same for numpy."""
    import numpy

    numpy.linalg.solve(numpy.eye(2), numpy.ones(2))
    numpy.linalg.det(numpy.eye(2)), numpy.roots([1, -3, 2]), repr(numpy.arange(3) * 1.5), numpy.arange(10).sum()
    str(numpy.float64(0.5)), numpy.mean([1, 2]), numpy.linspace(0, 1, 3), numpy.random.rand()
    numpy.random.seed(0)


def fill_pools() -> list[list[object]]:
    """Objects that take up the free places between those that are there.

    What a node makes then lies together in new pages, instead of among old ones that it would copy for it.
    """
    fillers = []
    for size in range(16, 513, 16):
        kept: list[object] = []
        first = 0
        while len(kept) < 1 << 16:
            kept.append(object() if size == 16 else float(len(kept)) if size == 32 else bytes(size - 33))
            place = id(kept[-1])
            if place & 0x3FFF == 48:  # The first place of a pool of 16 KiB: a new one if the next is taken next.
                first = place
            elif first and place - first <= 2 * size:
                break
            else:
                first = 0
        fillers.append(kept)
    return fillers
