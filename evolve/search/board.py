"""The board: which trees are to be grown, and where the Q-values of the grown ones are.

One small actor. Shards pull tasks from it when they have room and publish finished trees to it: a summary for
the counting, and a reference to the tree's Arrow record batch in the object store. Once a part file makes the tree
durable the reference is dropped, and with it the memory; Q-values (`q_values`) are then read from the part. What stays
in memory is a few numbers a problem, however many trees there are.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from evolve.files import Place, readable
from evolve.search.budget import (
    EscalatingBudget,
    Standing,
    TreeSummary,
    TreeTask,
    difficulty_class,
    expected_tokens,
    fair_share,
)
from evolve.search.grown import Earlier
from evolve.service import get
from evolve.store.trees import Part, TreeKey
from evolve.types import Problem


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
    note: str = ""
    """What the board has to do without."""
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By given difficulty: (solved, finished problems)."""
    classes: dict[str, int] = field(default_factory=dict)
    """Problems by difficulty class: easy, medium, hard."""


@dataclass(frozen=True, slots=True)
class _Live:
    """A tree that is counted but not yet in a part file; its batch dies with its shard."""

    shard: str
    summary: TreeSummary
    reference: Any


class Board:
    """State of one round's search; use as a Ray actor that makes one call at a time."""

    def __init__(
        self,
        budget: EscalatingBudget,
        problems: Sequence[Problem],
        finished: Iterable[tuple[TreeSummary, str]],
        trees: Place,
        earlier: Earlier | None = None,
        restarts: int = 3,
    ) -> None:
        """
        Args:
            budget: which trees are due.
            problems: the round's problems.
            finished: trees that are durable already, each with the name of its part file.
            trees: directory of the part files.
            earlier: trees of the round before: how long a problem took then is how long it is expected to take.
            restarts: how often a tree may be lost with its shard, or given up by it; once more, and the round stops.
        """
        self._budget = budget
        self._problems = {problem.id: problem for problem in problems}
        self._standings: dict[str, Standing] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        self._queue: list[tuple[float, int, int, TreeTask]] = []
        self._pushed = 0
        self._in_flight: dict[TreeKey, tuple[str, TreeTask]] = {}
        self._shards: set[str] = set()
        """Those that have taken trees, or wanted to, and were not given back since."""
        self._held: Counter[str] = Counter()
        """How many of them each shard has."""
        self._open: Counter[str] = Counter()
        """Trees of a problem that are queued or in flight."""
        self._failures: Counter[TreeKey] = Counter()
        """How often each tree was lost with a shard that died, or given up."""
        self._restarts = restarts
        self._live: dict[TreeKey, _Live] = {}
        self._directory = trees
        self._earlier, self._note = earlier.tokens_a_rollout(self._problems) if earlier else ({}, "")
        self._typical = sum(self._earlier.values()) / len(self._earlier) if self._earlier else 1.0
        """Tokens a rollout of a problem of which nothing is known, while nothing is known of this round."""
        self._totals: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._levels: Counter[tuple[str, str]] = Counter()
        self._failure = ""
        for summary, part in finished:
            self._count(summary, +1)
            self._name_part(summary.problem_id, part)
        for problem in problems:
            self._go_on(problem.id)

    def take(self, shard: str, room: int) -> list[TreeTask] | None:
        """Up to `room` trees for a shard to grow, the longest expected first; None when the round is over for it.

        An empty list means: not now. Others are at work whose trees may have to be grown again, or be followed by
        further ones.
        """
        self._shards.add(shard)
        self._drop_needless()
        if self._failure or (not self._queue and not self._in_flight):
            return None
        share = fair_share(room, self._held[shard], len(self._queue), len(self._in_flight), len(self._shards))
        tasks: list[TreeTask] = []
        while self._queue and len(tasks) < share:
            task = heapq.heappop(self._queue)[-1]
            key = TreeKey(task.problem.id, task.number)
            self._in_flight[key] = (shard, task)
            self._held[shard] += 1
            tasks.append(task)
            self._drop_needless()
        return tasks

    def publish(self, shard: str, trees: Sequence[tuple[TreeSummary, list[Any]]]) -> None:
        """Trees that are finished; each with its record batch's reference in a list (else Ray fetches it)."""
        for summary, reference in trees:
            key = TreeKey(summary.problem_id, summary.number)
            if summary.number in self._standing(key.problem_id).done:
                continue
            if key in self._in_flight:
                self._land(key)
                self._close(key.problem_id)
            self._failures.pop(key, None)
            self._live[key] = _Live(shard, summary, reference[0])
            self._count(summary, +1)
            self._go_on(key.problem_id)

    def durable(self, part: Part) -> None:
        """A part file is in place; its trees' batches may leave the object store.

        Of a tree that is in two parts, its shard having been thought dead, the first one is where it is.
        """
        for key in part.keys:
            if self._live.pop(key, None) is not None:
                self._name_part(key.problem_id, part.name)

    def give_up(self, key: TreeKey, reason: str) -> None:
        """A tree that its shard could not grow; it is queued again, at most so often."""
        if key in self._in_flight:
            self._again(key, reason)

    def give_back(self, shard: str, died: bool = False) -> None:
        """A shard ended: queue all it held again, what it had published but not made durable included."""
        self._shards.discard(shard)
        for key in [key for key, (owner, _) in self._in_flight.items() if owner == shard]:
            self._again(key, "its shard died" if died else "")
        for key, live in [(key, live) for key, live in self._live.items() if live.shard == shard]:
            del self._live[key]
            self._count(live.summary, -1)
            rollouts = self._budget.allotted(key.number) or live.summary.rollouts
            self._enqueue([TreeTask(self._problems[key.problem_id], key.number, rollouts)])

    def progress(self) -> Progress:
        """Counts so far, earlier runs of the same round included."""
        levels = sorted({level for level, _ in self._levels})
        coverage = {level: (self._levels[level, "solved"], self._levels[level, "finished"]) for level in levels}
        return Progress(
            problems=len(self._problems),
            settled=len(self._problems) - sum(count > 0 for count in self._open.values()),
            solved=sum(solved for solved, _ in coverage.values()),
            trees=self._totals["trees"],
            rollouts=self._totals["rollouts"],
            sampled_tokens=self._totals["sampled_tokens"],
            executions=self._totals["executions"],
            infrastructure_failures=self._totals["infrastructure_failures"],
            done=not self._queue and not self._in_flight and not self._live,
            failure=self._failure,
            note=self._note,
            coverage={level: counts for level, counts in coverage.items() if counts[1]},
            classes={name: count for name, count in self._classes.items() if count},
        )

    def unsolved(self) -> list[str]:
        """Ids of problems with finished trees and no correct trajectory."""
        return [p for p in self._problems if (known := self._standing(p)).done and not known.solved]

    def sources(self, problem_id: str) -> Sources:
        """Where the finished trees of a problem are, each in one place."""
        live = tuple(live.reference for key, live in self._live.items() if key.problem_id == problem_id)
        return Sources(problem_id, live, tuple(self._directory / name for name in self._parts.get(problem_id, ())))

    # ------------------------------------------------------------------ inside

    def _standing(self, problem_id: str) -> Standing:
        return self._standings.get(problem_id, _NOTHING)

    def _enqueue(self, tasks: Iterable[TreeTask]) -> None:
        for task in tasks:
            self._open[task.problem.id] += 1
            self._push(task)

    def _go_on(self, problem_id: str) -> None:
        """Queue what is due of a problem, unless some of its trees are still to come."""
        if not self._open[problem_id]:
            self._enqueue(self._budget.due(self._problems[problem_id], self._standing(problem_id)))

    def _push(self, task: TreeTask) -> None:
        rollouts = self._totals["rollouts"]
        typical = self._totals["sampled_tokens"] / rollouts if rollouts else self._typical
        standing, earlier = self._standing(task.problem.id), self._earlier.get(task.problem.id)
        expected = expected_tokens(task, standing, earlier, typical)
        self._pushed += 1
        # Where nothing tells them apart: the harder by the data set's own level, then in order.
        heapq.heappush(self._queue, (-expected, -(task.problem.difficulty or 0), self._pushed, task))

    def _land(self, key: TreeKey) -> TreeTask:
        """A tree is no longer in flight."""
        shard, task = self._in_flight.pop(key)
        self._held[shard] -= 1
        return task

    def _close(self, problem_id: str) -> None:
        """A queued or growing tree of the problem is no more."""
        self._open[problem_id] -= 1
        if not self._open[problem_id]:
            del self._open[problem_id]

    def _drop_needless(self) -> None:
        """Leave out what is next but need not be grown: of settled problems, or finished by a shard thought dead."""
        while self._queue:
            task = self._queue[0][-1]
            standing = self._standing(task.problem.id)
            if not self._budget.settled(standing) and task.number not in standing.done:
                return
            heapq.heappop(self._queue)
            self._close(task.problem.id)
            self._go_on(task.problem.id)

    def _again(self, key: TreeKey, reason: str) -> None:
        """Queue a tree in flight again, or fail the round; without a reason it is nobody's failure."""
        task = self._land(key)
        self._failures[key] += bool(reason)
        if self._failures[key] > self._restarts:
            self._failure = (
                f"tree {key.number} of problem {key.problem_id} failed {self._failures[key]} times, {self._restarts} "
                f"times are mended (cluster.restarts): {reason}"
            )
        self._push(task)

    def _name_part(self, problem_id: str, name: str) -> None:
        known = self._parts.get(problem_id, ())
        if name not in known:
            self._parts[problem_id] = (*known, sys.intern(name))

    def _count(self, summary: TreeSummary, sign: int) -> None:
        """Add a finished tree to what is known, or take it away again."""
        before = self._standing(summary.problem_id)
        after = before.plus(summary) if sign > 0 else before.minus(summary)
        self._standings[summary.problem_id] = after
        difficulty = self._problems[summary.problem_id].difficulty
        level = "all" if difficulty is None else str(difficulty)
        for standing, change in ((before, -1), (after, +1)):
            if standing.done:
                self._classes[difficulty_class(standing)] += change
                self._levels[level, "finished"] += change
                self._levels[level, "solved"] += change * standing.solved
        self._totals["trees"] += sign
        for name in ("rollouts", "sampled_tokens", "executions", "infrastructure_failures"):
            self._totals[name] += sign * getattr(summary, name)


_NOTHING = Standing()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the trees of one problem are."""

    problem_id: str
    batches: tuple[Any, ...]
    """References to record batches in the object store, of trees that are in no part file yet."""
    parts: tuple[Place, ...]


NAMESPACE = "evolve"
"""Ray's namespace of the boards."""


def start_board(run: str, *arguments: Any) -> Any:
    """A `Board` made with these arguments, as an actor that others find by the name of the run."""
    name = f"board of {run} since {time.time():.3f}"  # one that has just died may still have its name
    made: Any = ray.remote(Board).options(num_cpus=0, name=name, namespace=NAMESPACE)
    return made.remote(*arguments)


def board_of(run: str) -> Any:
    """The board of the round that a run (`run.name`) searches now, for any process that has joined its cluster.

    Raises:
        KeyError: it does not search now.
    """
    named = ray.util.list_named_actors(all_namespaces=True)
    found = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
    boards = sorted(name for name in found if name.startswith(f"board of {run} since "))
    if not boards:
        raise KeyError(f"no run named {run!r} searches in this cluster now")
    return ray.get_actor(boards[-1], namespace=NAMESPACE)


STATISTICS = ["tree", "node", "parent", "visits", "q", "kind", "correct"]


def q_values(board: Any, problem_id: str, timeout_s: float = 60.0) -> pa.Table:
    """Node statistics (columns `STATISTICS`) of a problem's finished trees, while the round runs.

    Read by a task that Ray starts where most of the batches are; they pass neither through the board nor the caller.

    Raises:
        KeyError: the problem has no finished tree.
        ServiceError: no answer in time.
    """
    found: Sources = get(board.sources.remote(problem_id), timeout_s, "the board")
    if not found.batches and not found.parts:
        raise KeyError(f"problem {problem_id!r} has no finished tree in this round")
    reference = ray.remote(statistics).options(num_cpus=0).remote(problem_id, found.parts, *found.batches)
    table: pa.Table = get(reference, timeout_s, f"the Q-values of {problem_id}")
    return table


def statistics(problem_id: str, parts: Sequence[Place], *batches: pa.RecordBatch) -> pa.Table:
    """Columns `STATISTICS` of a problem's trees, from part files and record batches."""
    tables = [pa.Table.from_batches([batch]).select(STATISTICS) for batch in batches]
    for path in parts:
        table = pq.read_table(readable(path), columns=STATISTICS, filters=pc.field("problem_id") == problem_id)
        tables.append(table.select(STATISTICS))
    return pa.concat_tables(tables).sort_by([("tree", "ascending"), ("node", "ascending")])
