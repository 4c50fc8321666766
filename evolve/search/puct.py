"""PUCT: UCT weighted by how likely the policy itself finds a step (AlphaZero; OpenR, arXiv 2410.09671)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evolve.search.rule import MeanValue
from evolve.tree import Tree

C_BASE = 19652
"""Visits of the parent at which exploration has grown by ln 2 (AlphaZero's constant, which OpenR keeps)."""


@dataclass(frozen=True, slots=True)
class PUCT(MeanValue):
    """PUCT(s) = Q(s) + P(s) * (ln((N_parent + c_base + 1) / c_base) + c) * sqrt(N_parent) / (1 + N(s)).

    c is `exploration`: 1.25 in OpenR, with c_base = 19652. P(s) = exp(mean log-probability of the step's tokens),
    as in AlphaMath (arXiv 2405.03553), in (0, 1] and not normalised over siblings, which are samples and not all
    actions there are. An unvisited node has no +inf: it competes with Q at its initial value (0, or the PPM's score)
    and the full bonus, so that a step the policy finds unlikely may stay untried. N_parent is at least 1: as in
    AlphaZero an expansion counts, else the first choice among fresh siblings would ignore P.
    """

    def select_score(self, tree: Tree, node: int, pending: int = 0, parent_pending: int = 0) -> float:
        """PUCT of `node`; rollouts in flight count as lost ones (virtual loss)."""
        visits = tree.visits[node] + pending
        parent_visits = max(1, tree.visits[tree.parent[node]] + max(pending, parent_pending))
        growth = math.log((parent_visits + C_BASE + 1) / C_BASE) + self.exploration
        bonus = step_probability(tree, node) * growth * math.sqrt(parent_visits) / (1 + visits)
        return self.q_in_flight(tree, node, pending) + bonus


def step_probability(tree: Tree, node: int) -> float:
    """exp(mean log-probability of the node's sampled tokens), in (0, 1]; 1 for a step without tokens."""
    logprobs = tree.logprobs[node]
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0
