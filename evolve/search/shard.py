"""The shard: grows many trees at once as coroutines of one actor, beside its engines and its verifier.

There is no barrier: a tree waits only for its own requests. The shard takes a new tree from the board whenever it has
room, and makes finished ones durable in parts.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from evolve.files import Place
from evolve.policy.formats import format_named
from evolve.schema import ValueKind
from evolve.search.budget import TreeSummary, TreeTask
from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.rules import rule_of
from evolve.search.seeds import tree_seed
from evolve.service import RemotePolicy, RemoteReward, RemoteVerifier, ServiceClient, ServiceError
from evolve.store.trees import TreeKey, to_batch, write_part
from evolve.tree import Tree
from evolve.types import Problem, RoundPlan, Sampling, Status

PART_TREES = 64
"""Finished trees that make a part file."""
PART_SECONDS = 15.0
"""A finished tree is durable after at most so long."""
TAKEN_AT_ONCE = 4
"""Trees that a shard asks the board for in one call: the longest go first, and the first shard to ask must not get them
all."""
IDLE_S = 0.25
"""How long a shard waits before it asks the board again, when that had nothing for it."""


@dataclass(frozen=True, slots=True)
class SearchJob:
    """Everything a shard must know to grow a round's trees."""

    plan: RoundPlan
    run_seed: int
    format: str
    few_shot: str
    sampling: Sampling
    max_depth: int
    context: int
    """Longest sequence the policy's engine takes, tokens."""
    concurrent_trees: int
    concurrent_rollouts: int
    tail_rollouts: int
    trees: Place
    policy: tuple[str, str]
    """Path and digest of the policy's checkpoint."""
    ppm: tuple[str, str] | None
    """The PPM's, where values start from it."""


class Shard:
    """One engine group's tree grower; use as an asyncio Ray actor."""

    def __init__(self, name: str, policy: Any, verifier: Any, ppm: Any | None, timeout_s: float) -> None:
        self.name = name
        self.policy = RemotePolicy(ServiceClient(policy, f"policy engine of {name}", timeout_s))
        self.verifier = RemoteVerifier(ServiceClient(verifier, f"verifier of {name}", timeout_s))
        self.reward = RemoteReward(ServiceClient(ppm, f"PPM engine of {name}", timeout_s)) if ppm else None
        self._round: _Round | None = None

    async def grow(self, job: SearchJob, board: Any) -> None:
        """Grow trees until the board has none left; returns when all of them are durable."""
        augmented = job.plan.value is ValueKind.ppm
        if augmented and self.reward is None:
            raise ValueError(f"{self.name}: round {job.plan.round} is PPM-augmented but no PPM engine was started")
        self.policy.client.expects = job.policy
        if self.reward is not None:
            self.reward.client.expects = job.ppm
        expander = Expander(
            policy=self.policy,
            verifier=self.verifier,
            format=format_named(job.format),
            sampling=job.sampling,
            candidates=job.plan.candidates,
            max_depth=job.max_depth,
            reward=self.reward if augmented else None,
            context=job.context,
        )
        self._round = _Round(self.name, job, board, expander)
        await self._round.run()

    async def stop(self) -> None:
        """Have `grow` return soon: what grows is dropped, what is finished made durable."""
        if self._round is not None:
            self._round.close()

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters of this shard's engines and verifier."""
        services: dict[str, Any] = {"policy": self.policy, "verifier": self.verifier}
        if self.reward is not None:
            services["ppm"] = self.reward
        return {name: dict(await service.stats()) for name, service in services.items()}


@dataclass(slots=True)
class _Round:
    """What one shard holds of one round: trees that grow, and grown ones that are not in a part file yet."""

    name: str
    job: SearchJob
    board: Any
    expander: Expander
    growing: set[asyncio.Task[None]] = field(default_factory=set)
    searches: dict[TreeKey, MCTS] = field(default_factory=dict)
    finished: list[tuple[pa.RecordBatch, Any]] = field(default_factory=list)
    """Batches, each with the reference that keeps it in the object store until it is durable."""
    at_once: int = 1
    """Rollouts in flight of each tree."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    flush: asyncio.Event = field(default_factory=asyncio.Event)
    """There is reason to write a part before its time."""
    closed: bool = False
    """No tree is to grow any longer."""
    errors: list[BaseException] = field(default_factory=list)

    async def run(self) -> None:
        """Grow what the board gives until it has nothing more."""
        self.at_once = self.job.concurrent_rollouts
        writer = asyncio.create_task(self._write_parts())
        writer.add_done_callback(self._ended)
        try:
            while not self.closed and await self._fill():
                if self.errors:
                    raise self.errors[0]
        finally:
            for task in self.growing:
                task.cancel()
            self.close()
            await writer

    def close(self) -> None:
        """Have `run` return soon, with everything durable that is finished."""
        self.closed = True
        self.changed.set()
        self.flush.set()

    async def _fill(self) -> bool:
        """Take trees while there is room, then wait for a change; False when the round is over."""
        self.changed.clear()
        room = self.job.concurrent_trees - len(self.growing)
        asked = min(room, TAKEN_AT_ONCE)
        tasks = await self.board.take.remote(self.name, asked) if asked else []
        if tasks is None and not self.growing:
            return False
        if tasks:
            self.at_once = self.job.concurrent_rollouts
        for task in tasks or []:
            growth = asyncio.create_task(self._grow(task))
            self.growing.add(growth)
            growth.add_done_callback(self._ended)
        if room and not tasks:
            self._widen()
        if tasks and room > len(tasks) == asked:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S if room > len(tasks or []) else None):
                await self.changed.wait()
        return True

    def _widen(self) -> None:
        """The tail of the round: what is left may keep the engine busy with more rollouts at once."""
        self.at_once = max(self.job.concurrent_rollouts, self.job.tail_rollouts)
        for search in self.searches.values():
            search.concurrent_rollouts = self.at_once

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.growing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)
        self.changed.set()

    async def _grow(self, task: TreeTask) -> None:
        key = TreeKey(task.problem.id, task.number)
        try:
            tree = await self._grow_tree(task, key)
        except ServiceError as error:
            await self.board.give_up.remote(key, str(error))
            return
        finally:
            self.searches.pop(key, None)
        batch = to_batch(tree)
        reference = ray.put(batch)
        self.finished.append((batch, reference))
        await self.board.publish.remote(self.name, [(summary_of(tree), [reference])])
        if len(self.finished) >= PART_TREES:
            self.flush.set()

    async def _grow_tree(self, task: TreeTask, key: TreeKey) -> Tree:
        job, plan, problem = self.job, self.job.plan, task.problem
        bare = Problem(problem.id, "", problem.answers)  # what travels with every request
        expander = self.expander
        [prompt] = await expander.policy.encode([job.few_shot + expander.format.prompt(problem.question)])
        tree = Tree(
            problem_id=problem.id,
            round=plan.round,
            number=task.number,
            seed=tree_seed(job.run_seed, plan.round, problem.id, task.number),
            prompt_ids=tuple(prompt),
            policy_digest=job.policy[1],
            ppm_digest=job.ppm[1] if job.ppm else "",
        )
        self.searches[key] = search = MCTS(expander, rule_of(plan, task.rollouts), self.at_once)
        await search.grow(tree, bare)
        return tree

    async def _write_parts(self) -> None:
        """The only one who does, so that a part that is being written is also announced: this is never cancelled."""
        while not self.closed or self.finished:
            if not self.closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PART_SECONDS):
                        await self.flush.wait()
                self.flush.clear()
            finished, self.finished = self.finished, []
            if finished:
                stem = f"part-{self.name}"
                part = await asyncio.to_thread(write_part, self.job.trees, stem, [batch for batch, _ in finished])
                await self.board.durable.remote(part)
                del finished  # the references that keep its trees in the object store


def summary_of(tree: Tree) -> TreeSummary:
    """The few numbers of a tree that are kept in memory."""
    grades = [tree.correct[terminal] for terminal in tree.terminals()]
    return TreeSummary(
        problem_id=tree.problem_id,
        number=tree.number,
        nodes=len(tree),
        correct=grades.count(True),
        wrong=grades.count(False),
        rollouts=tree.rollouts,
        sampled_tokens=tree.sampled_tokens,
        scored_tokens=tree.scored_tokens,
        executions=sum(
            bool(code) and status is not Status.INFRASTRUCTURE
            for code, status in zip(tree.code, tree.status, strict=True)
        ),
        infrastructure_failures=tree.infrastructure_failures,
    )
