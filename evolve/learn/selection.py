"""Which trajectories a policy learns from.

rStar-Math (arXiv 2501.04519): per problem the correct trajectories with the highest mean Q-value; synthetic
problems whose gold answer few trajectories reach are dropped, as are trajectories with an execution error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from evolve.schema import SFTConfig
from evolve.tree import Tree
from evolve.types import Status, Trajectory


@dataclass(frozen=True, slots=True)
class SelectionCounts:
    """What became of the trajectories: every one is in exactly one of the last five fields."""

    problems: int
    """Problems with any trajectory."""
    kept_problems: int
    """Problems with a trajectory that was kept."""
    kept: int
    wrong: int
    doubtful: int
    """Of synthetic problems that too few trajectories solve: their gold answer may be wrong."""
    duplicates: int
    surplus: int
    """Correct, but beyond the `trajectories` best of their problem."""


def clean_trajectories(tree: Tree) -> list[Trajectory]:
    """The tree's complete solutions on whose path everything ran.

    Decided by the typed verdicts of the path's nodes, never by what their text says: a solution that
    prints the word "error" is sound.
    """
    return [
        tree.trajectory(terminal)
        for terminal in tree.terminals()
        if all(tree.status[node] is Status.OK for node in tree.path(terminal))
    ]


def select(
    trajectories: Iterable[Trajectory], config: SFTConfig, synthetic: Collection[str] = ()
) -> tuple[list[Trajectory], SelectionCounts]:
    """The SFT rows among `trajectories` (of any number of trees and rounds), and what was left out.

    Of each problem up to `config.trajectories` correct ones, by falling mean Q; equal ones in the order
    (round, tree, node), so that the result does not depend on the order of the input. Trajectories of one
    problem with equal token ids count once. `synthetic` holds the ids of problems made by a model: they are
    dropped when under `config.synthetic_min_correct` of their trajectories are correct.
    """
    by_problem: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_problem[trajectory.problem_id].append(trajectory)

    kept: list[Trajectory] = []
    wrong = doubtful = duplicates = surplus = kept_problems = 0
    for problem_id in sorted(by_problem):
        found = by_problem[problem_id]
        correct = [t for t in found if t.correct]
        if problem_id in synthetic and len(correct) < config.synthetic_min_correct * len(found):
            doubtful += len(found)
            continue
        wrong += len(found) - len(correct)
        correct.sort(key=lambda t: (-t.q, t.round, t.tree, t.node))
        first: dict[tuple[tuple[int, ...], ...], Trajectory] = {}
        for trajectory in correct:
            first.setdefault((trajectory.prompt_ids, trajectory.token_ids), trajectory)
        distinct = list(first.values())
        duplicates += len(correct) - len(distinct)
        best = distinct[: config.trajectories]
        surplus += len(distinct) - len(best)
        kept_problems += bool(best)
        kept += best
    return kept, SelectionCounts(
        problems=len(by_problem),
        kept_problems=kept_problems,
        kept=len(kept),
        wrong=wrong,
        doubtful=doubtful,
        duplicates=duplicates,
        surplus=surplus,
    )
