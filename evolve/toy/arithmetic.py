"""The few Python statements that right solutions of the tiny world need, evaluated without `exec`.

The grammar: assignment and augmented assignment of a name, `print` of one expression, `pass`; in
expressions integers, names, brackets and `+ - * // %`. Everything else is refused, so that a
model's text can be judged here, in process, for tests and for the oracle. (Search itself runs
code in the sandbox of `evolve.verify`.)
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LARGEST = 10**12
"""Values beyond this are refused: nothing the world asks for comes near, and time stays bounded."""


class CodeError(ValueError):
    """The code is no code of the tiny world's grammar, or cannot be evaluated."""


def run(code: str, state: dict[str, int], exact: bool = False) -> str | None:
    """Evaluate `code`, updating `state` in place, and return what it printed, if it printed.

    With `exact`, a floor division that leaves a remainder is an error. Raises `CodeError` for
    code outside the grammar, unknown names, division by zero and values beyond 10**12.
    """
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CodeError(f"not Python: {error}") from error
    printed: str | None = None
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                state[name] = _value(value, state, exact)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                target = ast.Name(id=name, ctx=ast.Load())
                state[name] = _value(ast.BinOp(left=target, op=op, right=value), state, exact)
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[value], keywords=[])):
                printed = (printed or "") + f"{_value(value, state, exact)}\n"
            case ast.Pass():
                pass
            case _:
                raise CodeError(f"statement outside the tiny world's grammar: {ast.unparse(statement)!r}")
    return printed


def _value(node: ast.expr, state: dict[str, int], exact: bool) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            result = value
        case ast.Name(id=name):
            if name not in state:
                raise CodeError(f"unknown name {name!r}")
            result = state[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, state, exact), _value(right, state, exact)
            if b == 0 and isinstance(op, ast.FloorDiv | ast.Mod):
                raise CodeError("division by zero")
            if exact and isinstance(op, ast.FloorDiv) and a % b:
                raise CodeError(f"{a} // {b} leaves a remainder")
            result = _OPERATORS[type(op)](a, b)
        case _:
            raise CodeError(f"expression outside the tiny world's grammar: {ast.unparse(node)!r}")
    if abs(result) > _LARGEST:
        raise CodeError("value beyond 10**12")
    return result
