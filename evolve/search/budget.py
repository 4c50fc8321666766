"""Which problems get how many trees and rollouts, decided from what is known of them so far."""

from __future__ import annotations

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
    """What a finished tree came to."""

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
class Standing:
    """What is remembered of a problem's finished trees; small, for problems number in the hundred thousands."""

    done: tuple[int, ...] = ()
    """Numbers of the finished trees, in the order in which they were finished."""
    correct: int = 0
    wrong: int = 0
    rollouts: int = 0
    sampled_tokens: int = 0

    @property
    def solved(self) -> bool:
        return self.correct > 0

    def plus(self, tree: TreeSummary) -> Standing:
        """With one more finished tree."""
        return Standing(
            (*self.done, tree.number),
            self.correct + tree.correct,
            self.wrong + tree.wrong,
            self.rollouts + tree.rollouts,
            self.sampled_tokens + tree.sampled_tokens,
        )

    def minus(self, tree: TreeSummary) -> Standing:
        """Without a tree that was counted and is lost."""
        return Standing(
            tuple(number for number in self.done if number != tree.number),
            self.correct - tree.correct,
            self.wrong - tree.wrong,
            self.rollouts - tree.rollouts,
            self.sampled_tokens - tree.sampled_tokens,
        )


@dataclass(frozen=True, slots=True)
class EscalatingBudget:
    """`trees` trees for everyone; then, one at a time and only while unsolved, retries with other seeds and
    trees with the escalated rollouts (rStar-Math, round 4: 16, then 64, then 128).

    With `plan.settled` a problem gets no further tree once so many correct and so many wrong solutions are known;
    those of one tree are distinct, one that another tree found again counts again.
    """

    plan: RoundPlan

    def allotted(self, number: int) -> int | None:
        """Rollouts of a problem's tree `number`, or None when it gets no such tree."""
        base = self.plan.trees + self.plan.retry_trees
        if number < base:
            return self.plan.rollouts
        step = number - base
        return self.plan.escalation[step] if step < len(self.plan.escalation) else None

    def settled(self, standing: Standing) -> bool:
        """Whether both outcomes were seen often enough to need no further tree."""
        limit = self.plan.settled
        return limit is not None and standing.correct >= limit and standing.wrong >= limit

    def due(self, problem: Problem, standing: Standing) -> list[TreeTask]:
        """Trees of `problem` to grow now, given all its finished ones; empty when it needs none.

        Trees that are in flight are the caller's to leave out: nothing beyond the first `trees` is due
        before those are finished, nor before trees that were finished once and lost since.
        """
        if self.settled(standing):
            return []
        begun = max([self.plan.trees, *(n + 1 for n in standing.done)])
        missing = [n for n in range(begun) if n not in standing.done]
        if missing:
            numbers = missing
        elif standing.solved:
            numbers = []
        else:
            numbers = [begun]
        return [TreeTask(problem, n, r) for n in numbers if (r := self.allotted(n)) is not None]


def expected_tokens(task: TreeTask, standing: Standing, earlier: float | None, typical: float) -> float:
    """Tokens that a tree will take, as far as is known: its rollouts times the problem's tokens a rollout.

    Those are taken from its trees of this round, else `earlier` (a round before), else they are `typical`.
    """
    otherwise = typical if earlier is None else earlier
    rate = standing.sampled_tokens / standing.rollouts if standing.rollouts else otherwise
    return rate * task.rollouts


def fair_share(room: int, own: int, waiting: int, in_flight: int, shards: int) -> int:
    """How many of `waiting` trees a shard with `own` in flight and `room` for more may take.

    While there is plenty, as many as it has room for. Towards the end no shard takes more than its share of all that
    is left, in flight or waiting, so that the last trees end on all shards at about the same time.
    """
    share = -(-(waiting + in_flight) // shards) - own
    return max(0, min(room, waiting, share))


def difficulty_class(standing: Standing) -> str:
    """rStar-Math's classes: easy (every trajectory correct), medium (mixed), hard (none correct)."""
    return "hard" if standing.correct == 0 else "easy" if standing.wrong == 0 else "medium"
