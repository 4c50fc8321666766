"""The event log of a tree, and growing the tree again from it.

A tree's log is two small things that it keeps while it grows: when each node was expanded (`Tree.expanded_at`) and
where each rollout ended with which value (`Tree.ends`). Together with the nodes, whose ids are in order of their
making, they say everything that happened and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evolve.search.rule import TreePolicy
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind


@dataclass(frozen=True, slots=True)
class Expansion:
    """A node got its children."""

    node: int
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Backup:
    """A rollout ended and its value was backed up."""

    path: tuple[int, ...]
    """What was selected, from the root to where the rollout ended."""
    value: float


Event = Expansion | Backup


def events(tree: Tree) -> Iterator[Event]:
    """What happened to a tree that was grown by rollouts, in order.

    Expansions that fell between the same two backups and left no child may change places with one another.
    """
    expansions = sorted(
        (node for node in range(len(tree)) if tree.expanded_at[node] >= 0),
        key=lambda node: (tree.expanded_at[node], tree.children[node][0] if tree.children[node] else len(tree)),
    )
    waiting = iter([*expansions, None])
    node = next(waiting)
    for number in range(len(tree.ends) + 1):
        while node is not None and tree.expanded_at[node] <= number:
            yield Expansion(node, tuple(tree.children[node]))
            node = next(waiting)
        if number < len(tree.ends):
            end, value = tree.ends[number]
            yield Backup((ROOT, *tree.path(end)), value)


def replay(grown: Tree, rule: TreePolicy, log: Iterable[Event] | None = None) -> Tree:
    """The tree that `log` (default: all of `grown`'s own) leads to; with a part of the log, as it was then.

    Texts, ids, verdicts and initial values are taken from `grown`; visits, values, dead ends and nodes that were lost
    with all that could follow them come out of the log.

    Raises:
        ValueError: the log selects or expands a node that does not exist yet: it is not this tree's.
    """
    tree = Tree(
        problem_id=grown.problem_id,
        round=grown.round,
        number=grown.number,
        seed=grown.seed,
        prompt_ids=grown.prompt_ids,
        policy_digest=grown.policy_digest,
        ppm_digest=grown.ppm_digest,
        prior_weight=grown.prior_weight,
    )
    for event in events(grown) if log is None else log:
        if isinstance(event, Expansion):
            _expand(tree, grown, event)
        else:
            _back_up(tree, rule, event)
    return tree


def _expand(tree: Tree, grown: Tree, event: Expansion) -> None:
    if event.node >= len(tree) or tree.is_expanded(event.node):
        raise ValueError(f"the log expands node {event.node}, which does not exist yet or is expanded already")
    for child in event.children:
        made = tree.add(
            event.node,
            # A node that was expanded died, or was lost, later.
            NodeKind.STEP if grown.is_expanded(child) else grown.kind[child],
            grown.text[child],
            grown.code[child],
            grown.token_ids[child],
            grown.logprobs[child],
            inserted_ids=grown.inserted_ids[child],
            copies=grown.copies[child],
            status=grown.status[child],
            stdout=grown.stdout[child],
            answer=grown.answer[child],
            correct=grown.correct[child],
            code_ended=grown.code_ended[child],
            prior=grown.prior[child],
        )
        if made != child:
            raise ValueError(f"the log makes node {child} as number {made}: an expansion before it is missing")
    tree.expanded_at[event.node] = tree.rollouts
    tree.close_lost(event.node)


def _back_up(tree: Tree, rule: TreePolicy, event: Backup) -> None:
    for parent, child in zip(event.path, event.path[1:], strict=False):
        if child >= len(tree) or tree.parent[child] != parent:
            raise ValueError(f"the log selects node {child} below {parent}, where it is not (yet)")
    end = event.path[-1]
    if tree.kind[end] is not NodeKind.TERMINAL:
        tree.bury(end)
    rule.backup(tree, end, event.value)
