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

_LIGHT = frozenset(
    [
        "abc",
        "bisect",
        "builtins",
        "cmath",
        "collections",
        "copy",
        "enum",
        "functools",
        "heapq",
        "io",
        "itertools",
        "math",
        "numbers",
        "operator",
        "re",
        "string",
        "sys",
        "time",
        "typing",
    ]
)
_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import\b|import[ \t]+([\w. \t,]+))", re.MULTILINE)


def validate(config: VerifierConfig) -> None:
    """Refuse limits that make no sense.

    Raises:
        ValueError: names the key.
    """
    for finding in verifier_findings(config):
        raise ValueError(f"{finding.key} {finding.what}; {finding.mend}")


@lru_cache(maxsize=1 << 14)
def needs_full(code: str) -> bool:
    """Whether `code` imports, or may import, something a light interpreter has not loaded cheaply."""
    found = 0
    for match in _IMPORT.finditer(code):
        found += 1
        names = [match[1]] if match[1] else [part.split()[0] for part in match[2].split(",") if part.strip()]
        if any(name.partition(".")[0] not in _LIGHT for name in names):
            return True
    return code.count("import") != found


_NOT_PLAIN = re.compile(
    r"\b(?:import|def|class|for|while|lambda|with|try|del|global|assert|raise|if)\b|__|[\[\]@;]|\.\s*[A-Za-z_]"
)
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)


@lru_cache(maxsize=1 << 14)
def looks_plain(code: str) -> bool:
    """Whether the arithmetic lane may take `code`; it decides for itself, this only spares it the rest."""
    return len(code) <= 2000 and not _NOT_PLAIN.search(_COMMENT.sub("", code))


def prefix_keys(problem_id: str, kind: str, codes: Sequence[str]) -> list[str]:
    """The name of the interpreter state after each code of `codes`."""
    state = blake2b(f"{kind}\0{problem_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
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
