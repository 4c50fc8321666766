"""UCT by hand, and the invariants of selection and backup."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.search.rule import choose
from evolve.search.uct import UCT
from evolve.tree import Tree
from evolve.types import NodeKind


def tree_with_children(count: int) -> Tree:
    tree = Tree("p", 1, 0, 7, (1, 2))
    for number in range(count):
        tree.add(0, NodeKind.STEP, f"step {number}", "x = 1", (number + 3,), (-0.5,))
    return tree


def test_uct_of_a_worked_example() -> None:
    tree, rule = tree_with_children(2), UCT(rollouts=10, exploration=2.0)
    for child, value in ((1, 1.0), (1, -1.0), (1, 1.0), (2, -1.0)):
        rule.backup(tree, child, value)
    assert tree.visits == [4, 3, 1]
    assert tree.q(1) == pytest.approx(1 / 3)
    assert rule.select_score(tree, 1) == pytest.approx(1 / 3 + 2 * math.sqrt(math.log(4) / 3))
    assert rule.select_score(tree, 2) == pytest.approx(-1 + 2 * math.sqrt(math.log(4)))


def test_an_unvisited_child_is_tried_before_any_sibling_is_tried_again() -> None:
    tree, rule = tree_with_children(3), UCT(rollouts=10)
    rule.backup(tree, 1, 1.0)
    rule.backup(tree, 3, 1.0)
    assert rule.select_score(tree, 2) == math.inf
    assert choose(rule, tree, [1, 2, 3], {}, Random(0)) == 2


def test_ties_between_unvisited_children_are_broken_by_chance_not_by_index() -> None:
    tree, rule = tree_with_children(4), UCT(rollouts=10)
    chosen = {choose(rule, tree, [1, 2, 3, 4], {}, Random(seed)) for seed in range(40)}
    assert chosen == {1, 2, 3, 4}


def test_the_better_scored_of_unvisited_children_is_tried_first() -> None:
    tree, rule = tree_with_children(3), UCT(rollouts=10, augmented=True)
    tree.prior[1:] = [-0.2, 0.7, 0.1]
    assert {choose(rule, tree, [1, 2, 3], {}, Random(seed)) for seed in range(10)} == {2}


def test_a_dead_end_lowers_every_ancestor() -> None:
    tree, rule = tree_with_children(1), UCT(rollouts=10)
    grandchild = tree.add(1, NodeKind.DEAD, "bad", "1/0", (9,), (-1.0,))
    rule.backup(tree, grandchild, -1.0)
    assert [tree.q(node) for node in (0, 1, grandchild)] == [-1.0, -1.0, -1.0]


def test_a_rollout_in_flight_makes_its_path_less_attractive() -> None:
    tree, rule = tree_with_children(2), UCT(rollouts=10)
    rule.backup(tree, 1, 1.0)
    rule.backup(tree, 2, 1.0)
    assert rule.select_score(tree, 1, pending=1) < rule.select_score(tree, 2)


def test_virtual_loss_of_a_worked_example() -> None:
    tree, rule = tree_with_children(2), UCT(rollouts=10, exploration=2.0)
    for child in (1, 2, 2):
        rule.backup(tree, child, 1.0)
    # Two rollouts are below child 1, one below child 2, and this one has just come to the root.
    # Child 1: W = 1 - 2, N = 3; child 2: W = 2 - 1, N = 3; the parent has 3 visits and 3 others in flight.
    bonus = 2 * math.sqrt(math.log(6) / 3)
    assert rule.select_score(tree, 1, 2, 3) == pytest.approx(-1 / 3 + bonus)
    assert rule.select_score(tree, 2, 1, 3) == pytest.approx(1 / 3 + bonus)
    assert choose(rule, tree, [1, 2], {0: 4, 1: 2, 2: 1}, Random(0)) == 2
    assert choose(rule, tree, [1, 2], {0: 1}, Random(0)) == 1, "alone, the one with fewer visits"


def test_rollouts_in_flight_below_one_child_make_the_other_worth_exploring() -> None:
    tree, rule = tree_with_children(2), UCT(rollouts=10)
    rule.backup(tree, 1, 1.0)
    rule.backup(tree, 2, 1.0)
    assert rule.select_score(tree, 2, 0, 3) > rule.select_score(tree, 2, 0, 0)


def test_an_augmented_node_starts_at_the_ppm_score_and_counts_it_as_one_visit() -> None:
    tree, rule = tree_with_children(1), UCT(rollouts=10, augmented=True)
    tree.prior[1], tree.prior_weight = rule.initial_value(0.5)
    assert tree.q(1) == 0.5
    rule.backup(tree, 1, -1.0)
    assert tree.q(1) == pytest.approx(-0.25)


@pytest.mark.parametrize("score", [None, 1.5, -1.01, math.nan])
def test_a_score_outside_its_range_is_refused(score: float | None) -> None:
    with pytest.raises(ValueError, match="score in"):
        UCT(rollouts=1, augmented=True).initial_value(score)


@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    rollouts=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([-1.0, 1.0])), max_size=60),
    augmented=st.booleans(),
)
def test_backup_keeps_visits_consistent_and_q_within_range(
    parents: list[int], rollouts: list[tuple[int, float]], augmented: bool
) -> None:
    tree, rule = Tree("p", 1, 0, 0, (1,)), UCT(rollouts=100, augmented=augmented)
    for number, parent in enumerate(parents):
        tree.add(parent % (number + 1), NodeKind.STEP, str(number), "", (number,), (-0.1,))
        tree.prior[-1], tree.prior_weight = rule.initial_value(math.tanh(number - 5))
    ends = [0] * len(tree)
    for node, value in rollouts:
        rule.backup(tree, node % len(tree), value)
        ends[node % len(tree)] += 1
    assert tree.rollouts == tree.visits[0] == len(rollouts)
    for node in range(len(tree)):
        assert tree.visits[node] == ends[node] + sum(tree.visits[child] for child in tree.children[node])
        assert -1.0 <= tree.q(node) <= 1.0
