"""What a changed configuration would have changed of what is finished already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

STAGES = ("base", "search", "rows", "sft", "ppm", "evaluation")
"""Stages of a round in their order, as manifests name them; `base` is round 0's."""

_FIRST = (
    ("run.seed", "base"),
    ("toy.", "base"),
    ("policy.model", "base"),
    ("policy.revision", "base"),
    ("problems.", "search"),
    ("policy.", "search"),
    ("search.", "search"),
    ("verifier.", "search"),
    ("sft.trajectories", "rows"),
    ("sft.synthetic_min_correct", "rows"),
    ("sft.", "sft"),
    ("ppm.positives", "rows"),
    ("ppm.negatives", "rows"),
    ("ppm.negative_q", "rows"),
    ("ppm.trajectory_pairs", "rows"),
    ("ppm.", "ppm"),
    ("evaluate.", "evaluation"),
)
"""The first stage that depends on a key, by the key's beginning; the first entry that fits holds."""


def affected(key: str, finished: Mapping[int, Iterable[str]]) -> list[str]:
    """The finished artefacts (`round 2: sft`) that another value of `key` would have changed.

    `finished`: the artefacts that each round's manifest names. Everything after a changed artefact counts as changed
    with it, but for evaluations, on which nothing depends.
    """
    number = re.fullmatch(r"rounds\.(\d+)\..*", key)
    first_round = int(number[1]) if number else 0
    first = "search" if key.startswith("rounds") else next((s for start, s in _FIRST if key.startswith(start)), "base")
    found = []
    for round_, artefacts in sorted(finished.items()):
        for artefact in sorted(set(artefacts) & set(STAGES), key=STAGES.index):
            if first == "evaluation":
                hit = artefact == "evaluation"
            elif first in ("base", "search"):
                hit = round_ >= first_round and (first == "base" or _depends_on_search(key, round_, artefact))
            else:
                hit = round_ > 1 or (round_ == 1 and STAGES.index(artefact) >= STAGES.index(first))
            if hit:
                found.append(f"round {round_}: {artefact}")
    return found


def _depends_on_search(key: str, round_: int, artefact: str) -> bool:
    """Round 0 has no search; its evaluation depends on the problems and on how the policy samples alone."""
    return round_ > 0 or (artefact == "evaluation" and key.startswith(("problems.", "policy.", "verifier.")))
