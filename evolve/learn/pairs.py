"""Step pairs: what a process preference model (PPM) learns from.

rStar-Math (arXiv 2501.04519): among the candidates of one node, those with the highest Q-value that lead to a
correct answer against those with the lowest that lead to a wrong one, so that both share their prefix; and
for the final answer, the best correct whole trajectories against the worst wrong ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from evolve.schema import PPMConfig
from evolve.tree import ROOT, Tree
from evolve.types import StepPair

STEP = "step"
TRAJECTORY = "trajectory"


@dataclass(frozen=True, slots=True)
class _Continuation:
    """One side of a pair: tokens after the shared prefix, as sampled, and their value."""

    node: int
    ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    q: float


def mine(tree: Tree, config: PPMConfig) -> list[StepPair]:
    """All pairs of one tree, deduplicated; the pairs of one node and kind weigh 1 together.

    Every node is looked at: one without a pair does not hide those below it.
    """
    right, wrong = tree.leads_to(True), tree.leads_to(False)
    pairs: list[StepPair] = []
    for node, children in enumerate(tree.children):
        steps = {
            child: _Continuation(
                child,
                tree.token_ids[child] + tree.inserted_ids[child],
                (True,) * len(tree.token_ids[child]) + (False,) * len(tree.inserted_ids[child]),
                tree.q(child),
            )
            for child in children
            if right[child] or wrong[child]
        }
        pairs += _pair(
            tree, node, STEP,
            [steps[child] for child in steps if right[child]],
            [steps[child] for child in steps if wrong[child]],
            config.positives, config.negatives, config.negative_q,
        )  # fmt: skip
    if config.trajectory_pairs:
        whole = [t for t in tree.trajectories() if tree.visits[t.node] > 0]
        sides = {
            correct: [_Continuation(t.node, t.token_ids, t.sampled, t.q) for t in whole if t.correct is correct]
            for correct in (True, False)
        }
        pairs += _pair(
            tree, ROOT, TRAJECTORY, sides[True], sides[False],
            config.positives, config.negatives, config.negative_q,
        )  # fmt: skip
    return deduplicate(pairs)


def deduplicate(pairs: Iterable[StepPair]) -> list[StepPair]:
    """Pairs with distinct token ids, the first of equal ones kept, with the weights made to sum to 1 a node.

    For the pairs of several trees of one problem together: the same comparison found twice teaches no more
    than once.
    """
    distinct: dict[Hashable, StepPair] = {}
    for pair in pairs:
        key = (pair.problem_id, pair.prefix_ids, pair.positive_ids, pair.negative_ids)
        distinct.setdefault(key, pair)
    return normalise(list(distinct.values()))


def normalise(pairs: Sequence[StepPair]) -> list[StepPair]:
    """Equal weights within a node's pairs of one kind, summing to 1. Call it after every filter."""
    sizes = Counter(node_key(pair) for pair in pairs)
    return [replace(pair, weight=1.0 / sizes[node_key(pair)]) for pair in pairs]


def node_key(pair: StepPair) -> tuple[str, int, int, str, int]:
    """What the pairs of one node have in common. Whole trajectories and the root's steps are kept apart."""
    return (pair.problem_id, pair.round, pair.tree, pair.kind, pair.node)


def _pair(
    tree: Tree,
    node: int,
    kind: str,
    correct: Sequence[_Continuation],
    wrong: Sequence[_Continuation],
    positives: int,
    negatives: int,
    negative_q: float,
) -> list[StepPair]:
    """Best of `correct` against worst of `wrong`, where the values really differ."""
    best = _distinct(sorted(correct, key=lambda c: (-c.q, c.node)))[:positives]
    low = _distinct(sorted((c for c in wrong if c.q <= negative_q), key=lambda c: (c.q, c.node)))[:negatives]
    prefix = tree.prefix_ids(node)
    return [
        StepPair(
            problem_id=tree.problem_id,
            round=tree.round,
            tree=tree.number,
            node=node,
            kind=kind,
            prefix_ids=prefix,
            positive_ids=positive.ids,
            negative_ids=negative.ids,
            positive_sampled=positive.sampled,
            negative_sampled=negative.sampled,
            positive_q=positive.q,
            negative_q=negative.q,
            weight=1.0,
        )
        for positive in best
        for negative in low
        if negative.q < positive.q and negative.ids != positive.ids
    ]


def _distinct(continuations: Sequence[_Continuation]) -> list[_Continuation]:
    """The first of every set of equal token sequences, in order."""
    first: dict[tuple[int, ...], _Continuation] = {}
    for continuation in continuations:
        first.setdefault(continuation.ids, continuation)
    return list(first.values())
