"""The arithmetic lane: steps so plain that they need no process of their own. Runs inside the sandbox.

Most steps of simple word problems are a line such as `total = 16 * 2` or `print(total)`. Forking a
process for one costs a hundred times what running it does. Such steps are run by one sandboxed worker, in a
fresh namespace each, by the same compiler and interpreter as any other step. They cannot see each other:
the grammar below has no attributes, subscripts, displays of mutable objects, definitions or imports,
and every value is immutable, so that a namespace is all the state there is. What is not of this grammar,
grows large, or takes long is declined and goes the ordinary way.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _socket import socket as Socket

CALLS = frozenset(["abs", "bool", "divmod", "float", "int", "len", "max", "min", "pow", "print", "round", "str", "sum"])
NODES = (
    *(ast.Module, ast.Assign, ast.AugAssign, ast.Expr, ast.Name, ast.Load, ast.Store, ast.Constant),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Tuple, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.JoinedStr, ast.FormattedValue),
)
KEYWORDS = frozenset({"sep", "end", "ndigits"})
CONSTANTS = (int, float, str, bool, type(None))
LARGEST_BITS = 4096
LONGEST = 2000
REMEMBERED = 4096


def is_arithmetic(code: str) -> bool:
    """Whether `code` is of the lane's grammar."""
    if len(code) > LONGEST:
        return False
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, NODES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in CALLS):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
        if isinstance(node, ast.keyword) and node.arg not in KEYWORDS:
            return False
        if isinstance(node, ast.Constant) and not isinstance(node.value, CONSTANTS):
            return False
    return True


def is_small(value: object) -> bool:
    """Whether a value is immutable and takes little memory."""
    if isinstance(value, bool | float | None):
        return True
    if isinstance(value, int):
        return value.bit_length() <= LARGEST_BITS
    if isinstance(value, str):
        return len(value) <= LONGEST
    return isinstance(value, tuple) and len(value) <= 64 and all(map(is_small, value))


class Lane:
    """Runs steps of the lane's grammar; `run` is the harness's function that runs one step in a namespace."""

    def __init__(self, run: Callable[..., tuple[bytes, int]], stdout: Any) -> None:
        self.run, self.stdout = run, stdout
        self.states: dict[tuple[str, ...], dict[str, Any]] = {}
        self.plain: dict[str, bool] = {}

    def state(self, codes: tuple[str, ...]) -> dict[str, Any] | None:
        """The namespace after `codes`, rebuilt where it is not remembered; None: not of the lane."""
        if not codes:
            return {"__builtins__": builtins, "__name__": "__main__"}
        known = self.states.get(codes)
        if known is None:
            if self.step(codes) is None:
                return None
            known = self.states.get(codes)
        return known

    def step(self, codes: tuple[str, ...]) -> str | None:
        """Run the last of `codes` after the others; its result as JSON, or None: declined."""
        code = codes[-1]
        if code not in self.plain:
            if len(self.plain) >= REMEMBERED:
                self.plain.clear()
            self.plain[code] = is_arithmetic(code)
        before = self.state(codes[:-1]) if self.plain[code] else None
        if before is None:
            return None
        names = dict(before)
        frame, _ = self.run(code, len(codes), names, self.stdout)
        result = frame[1:].decode("ascii")
        if len(result) > LONGEST:
            return None
        if result.startswith('{"s":"ok"'):
            values = [value for name, value in names.items() if name not in ("__builtins__", "__name__")]
            if not all(map(is_small, values)):
                return None
            if len(self.states) >= REMEMBERED:
                self.states.clear()
            self.states[codes] = names
        return result

    def serve(self, channel: Socket) -> None:
        """Answer packets, each a JSON list of step lists, with a list of results in their order, for ever."""
        import json

        while True:
            packet = channel.recv(1 << 18)
            if not packet:
                return
            results = [self.step(tuple(codes)) or "null" for codes in json.loads(packet)]
            channel.send(("R[" + ",".join(results) + "]").encode("ascii"))
