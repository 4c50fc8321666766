"""Which problems get how many trees and rollouts, decided from what is known of them so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolve.types import Problem, RoundPlan


@dataclass(frozen=True, slots=True)
class TreeTask:
    """One tree to grow."""

    problem: Problem
    number: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class TreeSummary:
    """What is remembered of a finished tree; small, for trees number in the millions."""

    problem_id: str
    number: int
    nodes: int
    correct: int
    """Distinct correct trajectories."""
    wrong: int
    """Distinct wrong trajectories."""
    rollouts: int
    sampled_tokens: int
    scored_tokens: int
    executions: int
    infrastructure_failures: int

    @property
    def solved(self) -> bool:
        return self.correct > 0


@dataclass(frozen=True, slots=True)
class EscalatingBudget:
    """`trees` trees for everyone; then, one at a time and only while unsolved, retries with other seeds and
    trees with the escalated rollouts (rStar-Math, round 4: 16, then 64, then 128).
    """

    plan: RoundPlan

    def allotted(self, number: int) -> int | None:
        """Rollouts of a problem's tree `number`, or None when it gets no such tree."""
        base = self.plan.trees + self.plan.retry_trees
        if number < base:
            return self.plan.rollouts
        step = number - base
        return self.plan.escalation[step] if step < len(self.plan.escalation) else None

    def due(self, problem: Problem, finished: Sequence[TreeSummary]) -> list[TreeTask]:
        """Trees of `problem` to grow now, given all its finished ones; empty when it is settled.

        Trees that are in flight are the caller's to leave out: nothing beyond the first `trees` is due
        before those are finished.
        """
        done = {summary.number for summary in finished}
        first = [n for n in range(self.plan.trees) if n not in done]
        if first:
            numbers = first
        elif any(summary.solved for summary in finished):
            numbers = []
        else:
            numbers = [max(done) + 1]
        return [TreeTask(problem, n, r) for n in numbers if (r := self.allotted(n)) is not None]


def difficulty_class(finished: Sequence[TreeSummary]) -> str:
    """rStar-Math's classes: easy (every trajectory correct), medium (mixed), hard (none correct)."""
    correct = sum(summary.correct for summary in finished)
    wrong = sum(summary.wrong for summary in finished)
    return "hard" if correct == 0 else "easy" if wrong == 0 else "medium"
