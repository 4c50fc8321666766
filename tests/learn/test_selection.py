"""Which trajectories are learnt from."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from evolve.learn.selection import clean_trajectories, select
from evolve.schema import SFTConfig
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind, Status, Trajectory


@pytest.fixture
def base(trajectories: Callable[..., list[Trajectory]]) -> Trajectory:
    return trajectories(1)[0]


def found(base: Trajectory, *rows: tuple[str, bool, float, int]) -> list[Trajectory]:
    """Trajectories from (problem, correct, q, first token)."""
    return [
        replace(base, problem_id=p, correct=c, q=q, node=node, token_ids=(token, *base.token_ids[1:]))
        for node, (p, c, q, token) in enumerate(rows)
    ]


def test_the_best_correct_trajectories_of_each_problem_are_kept(base: Trajectory) -> None:
    rows = found(
        base, ("a", True, 0.1, 2), ("a", True, 0.9, 3), ("a", False, 1.0, 4), ("a", True, 0.5, 5), ("b", True, -0.5, 6)
    )
    kept, counts = select(rows, SFTConfig(trajectories=2))
    assert [(t.problem_id, t.q) for t in kept] == [("a", 0.9), ("a", 0.5), ("b", -0.5)]
    assert (counts.kept, counts.wrong, counts.surplus, counts.problems, counts.kept_problems) == (3, 1, 1, 2, 2)


def test_equal_token_sequences_count_once_and_do_not_crowd_out_others(base: Trajectory) -> None:
    rows = found(base, ("a", True, 0.9, 2), ("a", True, 0.8, 2), ("a", True, 0.5, 3), ("a", True, 0.1, 2))
    kept, counts = select(rows, SFTConfig(trajectories=1))
    assert [t.q for t in kept] == [0.9], "a repeated best one keeps its rank"
    kept, counts = select(rows, SFTConfig(trajectories=2))
    assert [t.q for t in kept] == [0.9, 0.5]
    assert counts.duplicates == 2


def test_equal_solutions_of_two_problems_are_both_kept(base: Trajectory) -> None:
    kept, _ = select(found(base, ("a", True, 0.9, 2), ("b", True, 0.9, 2)), SFTConfig())
    assert [t.problem_id for t in kept] == ["a", "b"]


def test_doubtful_synthetic_problems_are_dropped(base: Trajectory) -> None:
    rows = found(
        base, ("s", True, 0.9, 2), ("s", False, 0.0, 3), ("s", False, 0.0, 4), ("h", True, 0.9, 5), ("h", True, 0.5, 6),
        ("h", False, 0.0, 7), ("h", False, 0.0, 8), ("real", True, 0.1, 9), ("real", False, 0.0, 2),
        ("real", False, 0.0, 3),
    )  # fmt: skip
    kept, counts = select(rows, SFTConfig(), synthetic={"s", "h"})
    assert {t.problem_id for t in kept} == {"h", "real"}, "exactly half correct is enough"
    assert counts.doubtful == 3


def test_the_result_does_not_depend_on_the_order_in_which_trees_finish(base: Trajectory) -> None:
    rows = found(base, *(("a", True, 0.5, 2 + i) for i in range(6)))
    forward, _ = select(rows, SFTConfig())
    backward, _ = select(rows[::-1], SFTConfig())
    assert forward == backward
    assert [t.node for t in forward] == [0, 1]


def test_every_trajectory_is_accounted_for(base: Trajectory) -> None:
    rows = found(
        base, *(("a", i % 3 > 0, i / 10, 2 + i // 2) for i in range(12)), *(("s", i == 0, 0, i) for i in range(4))
    )
    kept, c = select(rows, SFTConfig(), synthetic={"s"})
    assert len(rows) == c.kept + c.wrong + c.doubtful + c.duplicates + c.surplus
    assert len(kept) == c.kept


def solution(tree: Tree, text: str, status: Status) -> None:
    step = tree.add(ROOT, NodeKind.STEP, text, "x", (5,), (-1.0,), status=status)
    tree.add(step, NodeKind.TERMINAL, "4", "", (6,), (-1.0,), answer="4", correct=True)


def test_a_path_with_an_execution_error_is_dropped_and_the_word_error_is_not() -> None:
    tree = Tree("p", 1, 0, 0, (2, 3))
    solution(tree, "print('relative error')", Status.OK)
    solution(tree, "fine words", Status.ERROR)
    solution(tree, "slow", Status.TIMEOUT)
    assert [t.text for t in clean_trajectories(tree)] == ["print('relative error')4"]
