"""PUCT by hand, and where it differs from UCT."""

import math

import pytest

from evolve.search.puct import C_BASE, PUCT, step_probability
from evolve.tree import Tree
from evolve.types import NodeKind


def tree_of_two() -> Tree:
    """Child 1: two tokens of mean log-probability -0.5; child 2: one token of -2."""
    tree = Tree("p", 1, 0, 7, (1, 2))
    tree.add(0, NodeKind.STEP, "likely", "x = 1", (3, 4), (-0.25, -0.75))
    tree.add(0, NodeKind.STEP, "unlikely", "x = 2", (5,), (-2.0,))
    return tree


def test_puct_of_a_worked_example() -> None:
    tree, rule = tree_of_two(), PUCT(rollouts=10, exploration=1.25)
    for child, value in ((1, 1.0), (1, -1.0), (1, 1.0), (2, -1.0)):
        rule.backup(tree, child, value)
    # N_parent = 4: growth = ln(19657 / 19652) + 1.25, sqrt(4) = 2
    growth = math.log(19657 / 19652) + 1.25
    assert rule.select_score(tree, 1) == pytest.approx(1 / 3 + math.exp(-0.5) * growth * 2 / 4)
    assert rule.select_score(tree, 2) == pytest.approx(-1 + math.exp(-2.0) * growth * 2 / 2)


def test_an_unvisited_child_competes_with_its_initial_value_and_the_whole_bonus() -> None:
    tree, rule = tree_of_two(), PUCT(rollouts=10, exploration=1.25)
    rule.backup(tree, 1, 1.0)
    bonus = math.exp(-2.0) * (math.log((C_BASE + 2) / C_BASE) + 1.25)
    assert rule.select_score(tree, 2) == pytest.approx(bonus)
    assert rule.select_score(tree, 1) > rule.select_score(tree, 2)


def test_of_fresh_siblings_the_likelier_is_tried_first() -> None:
    tree, rule = tree_of_two(), PUCT(rollouts=10)
    assert tree.visits[0] == 0, "a rollout that has just expanded the node descends further"
    assert rule.select_score(tree, 1) > rule.select_score(tree, 2) > 0


def test_of_equally_good_children_the_likelier_is_preferred() -> None:
    tree, rule = tree_of_two(), PUCT(rollouts=10)
    rule.backup(tree, 1, 1.0)
    rule.backup(tree, 2, 1.0)
    assert rule.select_score(tree, 1) > rule.select_score(tree, 2)


def test_a_rollout_in_flight_makes_its_path_less_attractive() -> None:
    tree, rule = tree_of_two(), PUCT(rollouts=10)
    rule.backup(tree, 1, 1.0)
    assert rule.select_score(tree, 1, pending=2) < rule.select_score(tree, 1)


def test_a_step_without_tokens_has_probability_one() -> None:
    tree = tree_of_two()
    assert step_probability(tree, 0) == 1.0
