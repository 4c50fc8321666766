"""UCT: how a rollout chooses among siblings and what it leaves behind (rStar-Math, arXiv 2501.04519, section 3.2).

Four pure functions over a tree; another search rule (PUCT, OmegaPRM's Q + U) is another class like this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from evolve.tree import Tree


class TreePolicy(Protocol):
    """The rule of a tree search."""

    def select_score(self, tree: Tree, node: int, pending: int = 0) -> float:
        """How much a rollout wants to pass through `node`; `pending` rollouts are below it already."""
        ...

    def initial_value(self, score: float | None) -> tuple[float, int]:
        """A new node's initial value in [-1, 1] and the visits it counts as, from the PPM's score."""
        ...

    def backup(self, tree: Tree, node: int, value: float) -> None:
        """Add a rollout's value in [-1, 1] to `node` and all its ancestors."""
        ...

    def stop(self, tree: Tree) -> bool:
        """Whether the tree has had its rollouts."""
        ...


@dataclass(frozen=True, slots=True)
class UCT:
    """UCT(s) = Q(s) + c * sqrt(ln N_parent(s) / N(s)); an unvisited node is tried before any sibling again.

    Q = q / N with q(s) the sum of the terminal values (+1 correct, -1 wrong or dead) backed up through s. With
    `augmented` values, a PPM's score is the initial q and counts as one visit, which keeps Q in [-1, 1]; the
    paper adds it without a visit, so that Q may leave that range.
    """

    rollouts: int
    exploration: float = 2.0
    augmented: bool = False

    def select_score(self, tree: Tree, node: int, pending: int = 0) -> float:
        """UCT of `node`; rollouts in flight count as lost ones (virtual loss)."""
        visits = tree.visits[node] + pending
        if visits == 0:
            return math.inf
        parent_visits = max(tree.visits[tree.parent[node]] + pending, visits)
        weight = visits + tree.prior_weight
        q = (tree.value_sum[node] - pending + tree.prior_weight * tree.prior[node]) / weight
        return q + self.exploration * math.sqrt(math.log(parent_visits) / visits)

    def initial_value(self, score: float | None) -> tuple[float, int]:
        """0 without weight when terminal-guided; the PPM's score as one visit when PPM-augmented."""
        if not self.augmented:
            return 0.0, 0
        if score is None or not -1.0 <= score <= 1.0:
            raise ValueError(f"PPM-augmented search needs a score in [-1, 1] for every node, got {score}")
        return score, 1

    def backup(self, tree: Tree, node: int, value: float) -> None:
        """q(s) += value and N(s) += 1 on the whole path, the root included."""
        while node >= 0:
            tree.visits[node] += 1
            tree.value_sum[node] += value
            node = tree.parent[node]
        tree.rollouts += 1

    def stop(self, tree: Tree) -> bool:
        """After `rollouts` rollouts."""
        return tree.rollouts >= self.rollouts


def choose(policy: TreePolicy, tree: Tree, nodes: Sequence[int], pending: dict[int, int], rng: Random) -> int:
    """The node with the highest score; of equal ones the higher initial value, then one by chance."""
    return max(nodes, key=lambda i: (policy.select_score(tree, i, pending.get(i, 0)), tree.prior[i], rng.random()))
