"""What is decided about a step before it is sent anywhere: limits, names of states, which interpreter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from evolve.checks import verifier as verifier_findings
from evolve.schema import VerifierConfig
from evolve.types import Status, Verdict

CODE_BYTES = 128 * 1024
"""Longest step that is run, bytes of UTF-8; what fits one packet."""

SHORT = 2000
"""Longest code, characters, of which it is remembered what it looks like: most are, and some megabytes hold them."""
CACHED = 1 << 13

_LIGHT = frozenset(
    (
        *("abc", "bisect", "builtins", "cmath", "collections", "copy", "enum", "functools", "heapq", "io", "itertools"),
        *("math", "numbers", "operator", "re", "string", "sys", "time", "typing"),
    )
)
_SYMBOLIC = _LIGHT | frozenset(
    (
        *("calendar", "contextlib", "dataclasses", "datetime", "decimal", "fractions", "json", "mpmath", "random"),
        *("statistics", "sympy", "textwrap", "types"),
    )
)
_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import\b|import[ \t]+([\w. \t,]+))", re.MULTILINE)


def validate(config: VerifierConfig) -> None:
    """Refuse limits that make no sense.

    Raises:
        ValueError: names the key.
    """
    for finding in verifier_findings(config):
        raise ValueError(f"{finding.key} {finding.what}; {finding.mend}")


def _imported(code: str) -> frozenset[str]:
    """The packages that `code` imports; `?` is among them where that cannot be told.

    Sympy's lambdify imports numpy when it is called.
    """
    found, names = 0, []
    for match in _IMPORT.finditer(code):
        found += 1
        names += [match[1]] if match[1] else [part.split()[0] for part in match[2].split(",") if part.strip()]
    names += ["?"] * (code.count("import") != found or "lambdify" in code)
    return frozenset(name.partition(".")[0] for name in names)


_imported_by_short = lru_cache(maxsize=CACHED)(_imported)


def server_kind(codes: Sequence[str]) -> str:
    """Which server runs `codes`: the one that forks most cheaply of those that have loaded what they import.

    `light` has a part of the standard library, `symbolic` sympy too, `full` also numpy.
    """
    found = (_imported_by_short(code) if len(code) <= SHORT else _imported(code) for code in codes)
    names = frozenset().union(*found)
    return "light" if names <= _LIGHT else "symbolic" if names <= _SYMBOLIC else "full"


_NOT_PLAIN = re.compile(
    r"\b(?:import|def|class|for|while|lambda|with|try|del|global|assert|raise|if)\b|__|[\[\]@;]|\.\s*[A-Za-z_]"
)
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)


def looks_plain(code: str) -> bool:
    """Whether the arithmetic lane may take `code`; it decides for itself, this only spares it the rest."""
    return len(code) <= SHORT and _short_is_plain(code)


@lru_cache(maxsize=CACHED)
def _short_is_plain(code: str) -> bool:
    return not _NOT_PLAIN.search(_COMMENT.sub("", code))


def prefix_keys(problem_id: str, codes: Sequence[str]) -> list[str]:
    """The name of the state after each code of `codes`, whichever interpreter it is in."""
    state = blake2b(problem_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    keys = []
    for code in codes:
        state = blake2b(state + code.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        keys.append(state.hex())
    return keys


def refusal(codes: Sequence[str]) -> Verdict | None:
    """Why `codes` are not run at all, if they are not."""
    for code in codes:
        if len(code) > CODE_BYTES or len(code.encode("utf-8", "surrogatepass")) > CODE_BYTES:
            return Verdict(Status.REFUSED, message=f"a step is longer than {CODE_BYTES} bytes")
    return None
