"""UCT (Kocsis & Szepesvári 2006), as rStar-Math uses it (arXiv 2501.04519, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evolve.search.rule import MeanValue
from evolve.tree import Tree


@dataclass(frozen=True, slots=True)
class UCT(MeanValue):
    """UCT(s) = Q(s) + c * sqrt(ln N_parent(s) / N(s)); an unvisited node is tried before any sibling again.

    c is `exploration`: 2 in the paper.
    """

    def select_score(self, tree: Tree, node: int, pending: int = 0, parent_pending: int = 0) -> float:
        """UCT of `node`, +inf while unvisited; rollouts in flight count as lost ones (virtual loss)."""
        visits = tree.visits[node] + pending
        if visits == 0:
            return math.inf
        parent_visits = tree.visits[tree.parent[node]] + max(pending, parent_pending)
        bonus = math.sqrt(math.log(parent_visits) / visits)
        return self.q_in_flight(tree, node, pending) + self.exploration * bonus
