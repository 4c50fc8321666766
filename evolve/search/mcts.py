"""Monte Carlo tree search over steps, one rollout after another on one tree, many trees at once.

A rollout descends by the tree rule, expanding every leaf it meets, until it reaches a terminal or a dead end; the
value found there (+1, -1; or the PPM's score at test time) is backed up to the root. One that ends where the sandbox or
the grader failed is not backed up, but uses up one of the tree's rollouts. Rollouts of one tree that are in flight at
once keep apart by a virtual loss.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

from evolve.search.expand import Expander
from evolve.search.rule import TreePolicy, choose
from evolve.search.seeds import derive
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind, Problem

DEAD_VALUE = -1.0


@dataclass(slots=True)
class MCTS:
    """Grows one tree a call; holds no state of a tree, so that calls may overlap."""

    expander: Expander
    rule: TreePolicy
    concurrent_rollouts: int = 1
    """May be raised while trees grow: each widens after its next rollout."""
    terminals_by_ppm: bool = False
    """Back up the PPM's score of a terminal and not its grade: test time, when no gold answer is known."""

    async def grow(self, tree: Tree, problem: Problem) -> None:
        """Run rollouts until the rule says stop or the root has no live child left."""
        try:
            async with asyncio.TaskGroup() as group:
                _Growth(self, tree, problem, group).widen()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def terminal_value(self, tree: Tree, node: int) -> float:
        """Value in [-1, 1] of reaching a terminal."""
        if self.terminals_by_ppm:
            return tree.prior[node]
        return 1.0 if tree.correct[node] else -1.0


@dataclass(slots=True)
class _Growth:
    """One tree while it grows: which nodes have rollouts below them, which are being expanded."""

    mcts: MCTS
    tree: Tree
    problem: Problem
    group: asyncio.TaskGroup
    workers: int = 0
    pending: dict[int, int] = field(default_factory=dict)
    expanding: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    started: int = -1
    lost: int = 0
    """Rollouts that ended without a value."""

    def __post_init__(self) -> None:
        self.started = self.tree.rollouts

    def widen(self) -> None:
        """Start as many workers as there may be rollouts in flight."""
        while self.workers < self.mcts.concurrent_rollouts:
            self.workers += 1
            self.group.create_task(self._work())

    async def _work(self) -> None:
        """Run rollouts one after the other until none is left to start."""
        while not self._done():
            self.started += 1
            await self._rollout(Random(derive(self.tree.seed, "rollout", self.started)))
            self.widen()

    def _done(self) -> bool:
        tree = self.tree
        if tree.is_expanded(ROOT) and not tree.live_children(ROOT):
            tree.note = tree.note or "nothing is left that can be continued"
            return True
        unseen = self.pending.get(ROOT, 0) + self.lost
        tree.rollouts += unseen
        done = self.mcts.rule.stop(tree)
        tree.rollouts -= unseen
        return done

    async def _rollout(self, rng: Random) -> None:
        tree, mcts = self.tree, self.mcts
        node = ROOT
        path = [node]
        self._mark(node, +1)
        try:
            while tree.kind[node] is not NodeKind.TERMINAL:
                if not tree.is_expanded(node):
                    await self._expand_once(node)
                live = tree.live_children(node)
                if not live:
                    break
                node = choose(mcts.rule, tree, live, self.pending, rng)
                path.append(node)
                self._mark(node, +1)
        finally:
            for visited in path:
                self._mark(visited, -1)
        if tree.kind[node] is NodeKind.TERMINAL:
            mcts.rule.backup(tree, node, mcts.terminal_value(tree, node))
        elif tree.is_lost(node):
            self.lost += 1
        else:
            tree.bury(node)
            mcts.rule.backup(tree, node, DEAD_VALUE)

    def _mark(self, node: int, change: int) -> None:
        self.pending[node] = self.pending.get(node, 0) + change
        if not self.pending[node]:
            del self.pending[node]

    async def _expand_once(self, node: int) -> None:
        """Expand a node; a second rollout that meets it meanwhile waits for the first."""
        if (running := self.expanding.get(node)) is not None:
            await asyncio.shield(running)
            return
        task = asyncio.ensure_future(self.mcts.expander.expand(self.tree, self.problem, node, self.mcts.rule))
        self.expanding[node] = task
        try:
            await task
        finally:
            del self.expanding[node]
