"""The search tree: a struct of arrays with integer node ids; the root is node 0.

A node's *prefix* is the problem's prompt and the steps from the root down to the node, both as the token
ids that were sampled (never a re-tokenisation of text).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from evolve.types import NodeKind, ScoreRequest, Status, Trajectory

ROOT = 0


@dataclass(slots=True)
class Tree:
    """Everything known of one problem's search.

    All lists are indexed by node id. `visits[i]` is N, `value_sum[i]` is W: the sum of the terminal
    values (in [-1, 1]) of the rollouts that passed through node i.
    """

    problem_id: str
    round: int
    number: int
    """Which of the problem's trees this is, from 0."""
    seed: int
    prompt_ids: tuple[int, ...]
    policy_digest: str = ""
    ppm_digest: str = ""

    parent: list[int] = field(default_factory=list)
    children: list[list[int]] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    kind: list[NodeKind] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    token_ids: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[tuple[float, ...]] = field(default_factory=list)
    inserted_ids: list[tuple[int, ...]] = field(default_factory=list)
    """Tokens that the environment put after the step (its output), not sampled."""
    copies: list[int] = field(default_factory=list)
    """How many of the parent's samples had this very text."""
    status: list[Status] = field(default_factory=list)
    stdout: list[str] = field(default_factory=list)
    answer: list[str | None] = field(default_factory=list)
    correct: list[bool | None] = field(default_factory=list)
    """For terminals: whether the answer was graded correct."""
    visits: list[int] = field(default_factory=list)
    value_sum: list[float] = field(default_factory=list)
    prior: list[float] = field(default_factory=list)
    """Initial value: the PPM's score of the node's prefix, or 0 where values start from terminals."""
    prior_weight: int = 0
    """How many visits the initial value counts as: 1 when a PPM gave it, else 0."""

    expanded_at: list[int] = field(default_factory=list)
    """How many rollouts were backed up when candidates were sampled for the node; -1 while they were not."""
    code_ended: list[bool] = field(default_factory=list)
    """Whether the code of the node's prefix is complete, so that only the answer in words is missing."""

    ends: list[tuple[int, float]] = field(default_factory=list)
    """For each rollout, in the order of their backups: the node it ended at and the value it brought.

    With `expanded_at` this is the tree's event log (`evolve.search.replay`)."""
    rollouts: int = 0
    """Rollouts that were backed up."""
    sampled_tokens: int = 0
    """Tokens the policy generated for this tree, discarded duplicates included."""
    scored_tokens: int = 0
    """Tokens of the prefixes and steps that the PPM was asked to score."""
    infrastructure_failures: int = 0
    note: str = ""
    """What was lost first, or why the search ended early, when it did."""

    def __post_init__(self) -> None:
        if not self.parent:
            self.add(-1, NodeKind.ROOT, "", "", (), ())

    def __len__(self) -> int:
        return len(self.parent)

    def add(
        self,
        parent: int,
        kind: NodeKind,
        text: str,
        code: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        *,
        inserted_ids: tuple[int, ...] = (),
        copies: int = 1,
        status: Status = Status.OK,
        stdout: str = "",
        answer: str | None = None,
        correct: bool | None = None,
        code_ended: bool = False,
        prior: float = 0.0,
    ) -> int:
        """Append a node under `parent` and return its id."""
        node = len(self.parent)
        self.parent.append(parent)
        self.children.append([])
        self.depth.append(0 if parent < 0 else self.depth[parent] + 1)
        self.kind.append(kind)
        self.text.append(text)
        self.code.append(code)
        self.token_ids.append(token_ids)
        self.logprobs.append(logprobs)
        self.inserted_ids.append(inserted_ids)
        self.copies.append(copies)
        self.status.append(status)
        self.stdout.append(stdout)
        self.answer.append(answer)
        self.correct.append(correct)
        self.visits.append(0)
        self.value_sum.append(0.0)
        self.prior.append(prior)
        self.expanded_at.append(-1)
        self.code_ended.append(code_ended)
        if parent >= 0:
            self.children[parent].append(node)
        return node

    # ----------------------------------------------------------------- life of a node

    def is_expanded(self, node: int) -> bool:
        """Whether candidates were sampled for the node; it may still have no live child."""
        return self.expanded_at[node] >= 0

    def live_children(self, node: int) -> list[int]:
        """Children that a search may enter."""
        return [child for child in self.children[node] if self.kind[child].live]

    def is_lost(self, node: int) -> bool:
        """Whether no child is live and one was lost: nobody knows what can follow the node."""
        return NodeKind.LOST in {self.kind[child] for child in self.children[node]} and not self.live_children(node)

    def bury(self, node: int) -> None:
        """Mark a node nothing can follow; the root stays the root."""
        if node != ROOT:
            self.kind[node] = NodeKind.DEAD
            self.close_lost(self.parent[node])

    def close_lost(self, node: int) -> None:
        """Mark the node lost if it is, and the ancestors that are with it; the root stays the root."""
        while node != ROOT and self.is_lost(node):
            self.kind[node] = NodeKind.LOST
            node = self.parent[node]

    # ----------------------------------------------------------------- values

    def q(self, node: int) -> float:
        """Mean value of the node in [-1, 1]; its initial value while unvisited."""
        weight = self.visits[node] + self.prior_weight
        if weight == 0:
            return self.prior[node]
        return (self.value_sum[node] + self.prior_weight * self.prior[node]) / weight

    # ----------------------------------------------------------------- paths

    def path(self, node: int) -> list[int]:
        """Node ids from the root's child down to `node`; empty for the root."""
        nodes = []
        while node > ROOT:
            nodes.append(node)
            node = self.parent[node]
        return nodes[::-1]

    def continuation_ids(self, node: int) -> tuple[int, ...]:
        """All tokens after the prompt up to the end of `node`, inserted ones included."""
        return tuple(t for i in self.path(node) for t in (*self.token_ids[i], *self.inserted_ids[i]))

    def continuation_sampled(self, node: int) -> tuple[bool, ...]:
        """For each of `continuation_ids(node)`, whether the policy sampled it."""
        return tuple(flag for i in self.path(node) for flag in _flags(self.token_ids[i], self.inserted_ids[i]))

    def prefix_ids(self, node: int) -> tuple[int, ...]:
        """Prompt and steps down to `node`: what the policy continues from."""
        return self.prompt_ids + self.continuation_ids(node)

    def prefix_code(self, node: int) -> tuple[str, ...]:
        """Code of the steps down to `node`, one entry a step that has code."""
        return tuple(self.code[i] for i in self.path(node) if self.code[i])

    def score_requests(self, node: int, steps: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[ScoreRequest]:
        """What a PPM needs to value each of `steps` after `node`; a step is (sampled ids, inserted ids)."""
        path = self.path(node)
        before = tuple(self.token_ids[i] + self.inserted_ids[i] for i in path)
        sampled_before = tuple(_flags(self.token_ids[i], self.inserted_ids[i]) for i in path)
        return [
            ScoreRequest(self.prompt_ids, (*before, ids + inserted), (*sampled_before, _flags(ids, inserted)))
            for ids, inserted in steps
        ]

    # ----------------------------------------------------------------- results

    def terminals(self) -> Iterator[int]:
        """Ids of complete, graded solutions."""
        return (i for i, kind in enumerate(self.kind) if kind is NodeKind.TERMINAL)

    @property
    def solved(self) -> bool:
        """Whether any terminal is correct."""
        return any(self.correct[i] for i in self.terminals())

    def both_reached(self, count: int) -> bool:
        """Whether rollouts reached at least `count` distinct correct and as many distinct wrong solutions."""
        grades = [self.correct[i] for i in self.terminals() if self.visits[i] > 0]
        return grades.count(True) >= count and grades.count(False) >= count

    def trajectory(self, terminal: int) -> Trajectory:
        """The complete solution that ends at `terminal`."""
        path = self.path(terminal)
        return Trajectory(
            problem_id=self.problem_id,
            round=self.round,
            tree=self.number,
            node=terminal,
            correct=bool(self.correct[terminal]),
            q=sum(self.q(i) for i in path) / len(path),
            prompt_ids=self.prompt_ids,
            token_ids=self.continuation_ids(terminal),
            sampled=self.continuation_sampled(terminal),
            text="".join(self.text[i] for i in path),
            answer=self.answer[terminal] or "",
            logprob=sum(sum(self.logprobs[i]) for i in path),
        )

    def trajectories(self) -> list[Trajectory]:
        """Every complete solution, in the order in which they were found."""
        return [self.trajectory(i) for i in self.terminals()]

    def leads_to(self, correct: bool) -> list[bool]:
        """For every node, whether a *visited* terminal below it (or itself) is correct / wrong."""
        found = [False] * len(self)
        for terminal in self.terminals():
            if self.correct[terminal] is correct and self.visits[terminal] > 0:
                node = terminal
                while node >= 0 and not found[node]:
                    found[node] = True
                    node = self.parent[node]
        return found


def _flags(sampled: tuple[int, ...], inserted: tuple[int, ...]) -> tuple[bool, ...]:
    """Which of a step's tokens the policy sampled."""
    return (True,) * len(sampled) + (False,) * len(inserted)
