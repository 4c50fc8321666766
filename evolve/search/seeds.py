"""Seeds: every random choice derives from what it is for, so that a tree can be grown again anywhere."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A 31-bit seed from the parts' text, equal on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def tree_seed(run_seed: int, round_: int, problem_id: str, number: int) -> int:
    """Seed of one tree of one problem in one round."""
    return derive("tree", run_seed, round_, problem_id, number)
