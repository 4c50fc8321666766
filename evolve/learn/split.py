"""Training and validation problems."""

from __future__ import annotations

import hashlib


def held_out(problem_id: str, share: float) -> bool:
    """Whether a problem is on the validation side; `share` of all problems are, in expectation.

    A function of the id alone, so that all pairs of a problem (of every tree and every round) are on the
    same side, and stay there in later rounds.
    """
    digest = hashlib.sha256(b"validation:" + problem_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
