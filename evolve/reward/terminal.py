"""The terminal reward: what a finished solution is worth by the ground truth alone."""

from __future__ import annotations

from evolve.types import Outcome

CORRECT = 1.0
WRONG = -1.0
DEAD = -1.0
"""A path that can lead to no answer: its code failed, its text was no step, or it grew too deep."""


def terminal_value(outcome: Outcome) -> float | None:
    """+1 for a correct answer, -1 for a wrong one (rStar-Math, arXiv 2501.04519, section 3.2).

    None for an answer that was not graded (the comparison timed out, or the grader failed): it is
    no label, and must be dropped and counted, never backed up.
    """
    match outcome:
        case Outcome.CORRECT:
            return CORRECT
        case Outcome.WRONG:
            return WRONG
        case Outcome.TIMEOUT | Outcome.INFRASTRUCTURE:
            return None
