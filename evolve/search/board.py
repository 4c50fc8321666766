"""The board: which trees are to be grown, and where the Q-values of the grown ones are.

One small actor. Shards pull tasks from it when they have room and publish finished trees to it: a summary for
the counting, and a reference to the tree's Arrow record batch in the object store. Once a part file makes the tree
durable the reference is dropped, and with it the memory; Q-values are then read from the part.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from evolve.search.budget import EscalatingBudget, TreeSummary, TreeTask, difficulty_class
from evolve.store.trees import Part, TreeKey
from evolve.types import Problem

MAX_ATTEMPTS = 3
"""How often a tree is begun before the round stops with an error."""


@dataclass(slots=True)
class Progress:
    """What a driver shows and waits for."""

    problems: int
    settled: int
    """Problems that get no further tree."""
    solved: int
    trees: int
    rollouts: int
    sampled_tokens: int
    executions: int
    infrastructure_failures: int
    done: bool
    failure: str = ""
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By given difficulty: (solved, finished problems)."""
    classes: dict[str, int] = field(default_factory=dict)
    """Problems by difficulty class: easy, medium, hard."""


class Board:
    """State of one round's search; use as a Ray actor."""

    def __init__(
        self,
        budget: EscalatingBudget,
        problems: Sequence[Problem],
        finished: Sequence[TreeSummary],
        parts: dict[TreeKey, str],
        trees: Path,
    ) -> None:
        self._budget = budget
        self._problems = {problem.id: problem for problem in problems}
        self._finished: dict[str, list[TreeSummary]] = {problem.id: [] for problem in problems}
        self._queue: deque[TreeTask] = deque()
        self._in_flight: dict[TreeKey, tuple[str, TreeTask]] = {}
        self._attempts: Counter[TreeKey] = Counter()
        self._live: dict[TreeKey, Any] = {}
        self._parts = dict(parts)
        self._directory = trees
        self._failure = ""
        for summary in finished:
            self._finished[summary.problem_id].append(summary)
        for problem in problems:
            self._queue.extend(budget.due(problem, self._finished[problem.id]))

    def take(self, shard: str, room: int) -> list[TreeTask] | None:
        """Up to `room` trees for a shard to grow; None when the round has nothing left to give or do."""
        if self._failure or (not self._queue and not self._in_flight):
            return None
        tasks = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        for task in tasks:
            key = TreeKey(task.problem.id, task.number)
            self._attempts[key] += 1
            self._in_flight[key] = (shard, task)
        return tasks

    def publish(self, trees: Sequence[tuple[TreeSummary, list[Any]]]) -> None:
        """Trees that are finished; each with its record batch's reference in a list (else Ray fetches it)."""
        for summary, reference in trees:
            key = TreeKey(summary.problem_id, summary.number)
            self._in_flight.pop(key, None)
            finished = self._finished[summary.problem_id]
            if any(known.number == summary.number for known in finished):
                continue
            if key not in self._parts:
                self._live[key] = reference[0]
            finished.append(summary)
            self._queue.extend(
                task
                for task in self._budget.due(self._problems[summary.problem_id], finished)
                if TreeKey(task.problem.id, task.number) not in self._in_flight
                and task.number >= self._budget.plan.trees
            )

    def durable(self, part: Part) -> None:
        """A part file is in place; its trees' batches may leave the object store."""
        for key in part.keys:
            self._parts[key] = part.name
            self._live.pop(key, None)

    def give_back(self, shard: str, failed: Sequence[tuple[TreeKey, str]] = ()) -> None:
        """Queue a shard's trees again: all it holds (it died), or those that `failed`, with the reason."""
        keys = [key for key, _ in failed] or [k for k, (owner, _) in self._in_flight.items() if owner == shard]
        reasons = dict(failed)
        for key in keys:
            entry = self._in_flight.pop(key, None)
            if entry is None:
                continue
            if self._attempts[key] >= MAX_ATTEMPTS:
                reason = reasons.get(key, "its shard died")
                self._failure = f"tree {key.number} of problem {key.problem_id} failed {MAX_ATTEMPTS} times: {reason}"
            self._queue.append(entry[1])

    def progress(self) -> Progress:
        """Counts so far, earlier runs of the same round included."""
        summaries = [summary for finished in self._finished.values() for summary in finished]
        waiting = {task.problem.id for task in self._queue} | {key.problem_id for key in self._in_flight}
        coverage: dict[str, tuple[int, int]] = {}
        classes: Counter[str] = Counter()
        for problem in self._problems.values():
            finished = self._finished[problem.id]
            if finished:
                level = str(problem.difficulty) if problem.difficulty is not None else "all"
                solved, total = coverage.get(level, (0, 0))
                coverage[level] = (solved + any(s.solved for s in finished), total + 1)
                classes[difficulty_class(finished)] += 1
        return Progress(
            problems=len(self._problems),
            settled=len(self._problems) - len(waiting),
            solved=sum(solved for solved, _ in coverage.values()),
            trees=len(summaries),
            rollouts=sum(s.rollouts for s in summaries),
            sampled_tokens=sum(s.sampled_tokens for s in summaries),
            executions=sum(s.executions for s in summaries),
            infrastructure_failures=sum(s.infrastructure_failures for s in summaries),
            done=not self._queue and not self._in_flight and not self._live,
            failure=self._failure,
            coverage=dict(sorted(coverage.items())),
            classes=dict(classes),
        )

    def unsolved(self) -> list[str]:
        """Ids of problems with finished trees and no correct trajectory."""
        return [p for p, done in self._finished.items() if done and not any(s.solved for s in done)]

    def q_values(self, problem_id: str) -> pa.Table:
        """Node statistics of a problem's trees: columns tree, node, parent, visits, q, kind, correct.

        Raises:
            KeyError: the problem has no finished tree.
        """
        columns = ["tree", "node", "parent", "visits", "q", "kind", "correct"]
        tables = [
            pa.Table.from_batches([ray.get(ref)]).select(columns)
            for key, ref in self._live.items()
            if key.problem_id == problem_id
        ]
        parts = {name for key, name in self._parts.items() if key.problem_id == problem_id}
        for name in sorted(parts):
            table = pq.read_table(self._directory / name, columns=["problem_id", *columns])
            tables.append(table.filter(pc.field("problem_id") == problem_id).select(columns))
        if not tables:
            raise KeyError(f"problem {problem_id!r} has no finished tree in this round")
        return pa.concat_tables(tables).sort_by([("tree", "ascending"), ("node", "ascending")])


def summarise(directory: Path, parts: Iterable[str]) -> list[TreeSummary]:
    """Summaries of the trees in part files, for continuing a round; reads whole trees' counters only."""
    columns = [
        "problem_id", "tree", "node", "kind", "correct", "rollouts", "sampled_tokens", "scored_tokens",
        "infrastructure_failures", "code",
    ]  # fmt: skip
    summaries: list[TreeSummary] = []
    for name in parts:
        rows = pq.read_table(directory / name, columns=columns).to_pylist()
        trees: dict[TreeKey, list[dict[str, Any]]] = {}
        for row in rows:
            trees.setdefault(TreeKey(row["problem_id"], row["tree"]), []).append(row)
        summaries += [_summary(key, nodes) for key, nodes in trees.items()]
    return summaries


def _summary(key: TreeKey, nodes: list[dict[str, Any]]) -> TreeSummary:
    root = nodes[0]
    return TreeSummary(
        problem_id=key.problem_id,
        number=key.number,
        nodes=len(nodes),
        correct=sum(row["correct"] is True for row in nodes),
        wrong=sum(row["correct"] is False for row in nodes),
        rollouts=root["rollouts"],
        sampled_tokens=root["sampled_tokens"],
        scored_tokens=root["scored_tokens"],
        executions=sum(bool(row["code"]) for row in nodes),
        infrastructure_failures=root["infrastructure_failures"],
    )
