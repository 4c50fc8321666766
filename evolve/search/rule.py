"""The rule of a tree search: the seam between what explores (`evolve.search.mcts`) and how it weighs.

A rule is four pure functions over a tree; `UCT` and `PUCT` are one file each. They share what a rollout leaves behind,
the mean value of rStar-Math (arXiv 2501.04519, section 3.2), which is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from evolve.tree import Tree


class TreePolicy(Protocol):
    """The rule of a tree search."""

    def select_score(self, tree: Tree, node: int, pending: int = 0, parent_pending: int = 0) -> float:
        """How much a rollout wants to pass through `node`.

        So many other rollouts are below it already, and below its parent (those below it among them).
        """
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
class MeanValue:
    """Q(s) = q(s) / N(s), with q(s) the sum of the values backed up through s and N(s) their number.

    A terminal's value is +1 (correct) or -1 (wrong), a dead end's -1; it lowers every ancestor. With `augmented`
    values a PPM's score is the initial q and counts as one visit, which keeps Q in [-1, 1]; the paper adds it without
    a visit, so that Q may leave that range.
    """

    rollouts: int
    exploration: float = 2.0
    augmented: bool = False
    settled: int | None = None
    """Stop early once so many distinct correct and so many distinct wrong solutions were reached; None: never."""

    def initial_value(self, score: float | None) -> tuple[float, int]:
        """0 without weight when terminal-guided; the PPM's score as one visit when PPM-augmented.

        Raises:
            ValueError: PPM-augmented and the score is missing or outside [-1, 1].
        """
        if not self.augmented:
            return 0.0, 0
        if score is None or not -1.0 <= score <= 1.0:
            raise ValueError(f"PPM-augmented search needs a score in [-1, 1] for every node, got {score}")
        return score, 1

    def backup(self, tree: Tree, node: int, value: float) -> None:
        """q(s) += value and N(s) += 1 on the whole path, the root included."""
        tree.ends.append((node, value))
        while node >= 0:
            tree.visits[node] += 1
            tree.value_sum[node] += value
            node = tree.parent[node]
        tree.rollouts += 1

    def stop(self, tree: Tree) -> bool:
        """After `rollouts` rollouts, or once both outcomes were `settled`."""
        return tree.rollouts >= self.rollouts or (self.settled is not None and tree.both_reached(self.settled))

    def q_in_flight(self, tree: Tree, node: int, pending: int) -> float:
        """Q of a node whose `pending` rollouts in flight are counted as lost (virtual loss); 0 without any weight."""
        weight = tree.visits[node] + pending + tree.prior_weight
        if weight == 0:
            return 0.0
        return (tree.value_sum[node] - pending + tree.prior_weight * tree.prior[node]) / weight


def choose(policy: TreePolicy, tree: Tree, nodes: Sequence[int], pending: dict[int, int], rng: Random) -> int:
    """The sibling with the highest score; of equal ones the higher initial value, then one by chance.

    `pending`: by node, the rollouts below it; the one that chooses is among those of the siblings' parent.
    """
    beside = max(0, pending.get(tree.parent[nodes[0]], 0) - 1)

    def rank(node: int) -> tuple[float, float, float]:
        score = policy.select_score(tree, node, pending.get(node, 0), beside)
        return score, tree.prior[node], rng.random()

    return max(nodes, key=rank)
