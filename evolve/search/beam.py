"""Step-level beam search under a PPM (arXiv 2408.03314): keep the best `width` prefixes of every depth.

Finished solutions leave the beam and are kept aside (a beam that holds one must not renumber its parents).
"""

from __future__ import annotations

from dataclasses import dataclass

from evolve.search.expand import Expander
from evolve.search.uct import UCT
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind, Problem

_RULE = UCT(rollouts=0, augmented=True)


@dataclass(slots=True)
class Beam:
    """Expands every prefix of the beam by the expander's number of candidates, then keeps `width`."""

    expander: Expander
    width: int

    async def grow(self, tree: Tree, problem: Problem) -> None:
        """Search until the beam is empty or has finished `width` solutions."""
        if self.expander.reward is None:
            raise ValueError("beam search needs a PPM to rank prefixes by")
        beam, finished = [ROOT], 0
        while beam and finished < self.width:
            children: list[int] = []
            for node in beam:
                await self.expander.expand(tree, problem, node, _RULE)
                children += tree.live_children(node)
            best = sorted(children, key=lambda i: (-tree.prior[i], i))[: self.width - finished]
            finished += sum(tree.kind[i] is NodeKind.TERMINAL for i in best)
            beam = [i for i in best if tree.kind[i] is NodeKind.STEP]
            for node in best:
                tree.visits[node] += 1


def chosen(tree: Tree) -> int | None:
    """The terminal with the highest PPM score among those that the search reached; None without any."""
    reached = [i for i in tree.terminals() if tree.visits[i] > 0] or list(tree.terminals())
    return max(reached, key=lambda i: (tree.prior[i], -i), default=None)
