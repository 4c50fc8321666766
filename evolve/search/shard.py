"""The shard: grows many trees at once as coroutines of one actor, beside its engines and its verifier.

There is no barrier: a tree waits only for its own requests. The shard takes a new tree from the board whenever it has
room, and makes finished ones durable in parts.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from evolve.policy.formats import format_named
from evolve.schema import ValueKind
from evolve.search.budget import TreeSummary, TreeTask
from evolve.search.expand import Expander, InfrastructureError
from evolve.search.mcts import MCTS
from evolve.search.seeds import tree_seed
from evolve.search.uct import UCT
from evolve.service import RemotePolicy, RemoteReward, RemoteVerifier, ServiceClient
from evolve.store.trees import TreeKey, to_batch, write_part
from evolve.tree import Tree
from evolve.types import Problem, RoundPlan, Sampling

PART_TREES = 64
"""Finished trees that make a part file."""
PART_SECONDS = 15.0
"""A finished tree is durable after at most so long."""
IDLE_S = 0.1


@dataclass(frozen=True, slots=True)
class SearchJob:
    """Everything a shard must know to grow a round's trees."""

    plan: RoundPlan
    run_seed: int
    format: str
    few_shot: str
    sampling: Sampling
    max_depth: int
    concurrent_trees: int
    concurrent_rollouts: int
    trees: Path
    policy: tuple[str, str]
    """Path and digest of the policy's checkpoint."""
    ppm: tuple[str, str] | None
    """The PPM's, where values start from it."""


@dataclass(slots=True)
class _Finished:
    """Trees that are grown but not yet in a part file."""

    trees: list[Tree] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)


class Shard:
    """One engine group's tree grower; use as an asyncio Ray actor."""

    def __init__(self, name: str, policy: Any, verifier: Any, ppm: Any | None, timeout_s: float) -> None:
        self.name = name
        self.policy = RemotePolicy(ServiceClient(policy, f"policy engine of {name}", timeout_s))
        self.verifier = RemoteVerifier(ServiceClient(verifier, f"verifier of {name}", timeout_s))
        self.reward = RemoteReward(ServiceClient(ppm, f"PPM engine of {name}", timeout_s)) if ppm else None
        self._growing = 0

    async def grow(self, job: SearchJob, board: Any) -> None:
        """Grow trees until the board has none left; returns when all of them are durable."""
        augmented = job.plan.value is ValueKind.ppm
        if augmented and self.reward is None:
            raise ValueError(f"{self.name}: round {job.plan.round} is PPM-augmented but no PPM engine was started")
        self.policy.client.expects = job.policy
        if self.reward is not None:
            self.reward.client.expects = job.ppm
        finished = _Finished()
        changed = asyncio.Event()
        flusher = asyncio.create_task(self._flush_regularly(job, board, finished))
        running: set[asyncio.Task[None]] = set()
        errors: list[BaseException] = []

        def ended(task: asyncio.Task[None]) -> None:
            running.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                errors.append(error)
            changed.set()

        try:
            while True:
                if errors:
                    raise errors[0]
                changed.clear()
                room = job.concurrent_trees - len(running)
                tasks = await board.take.remote(self.name, room) if room else []
                if tasks is None and not running:
                    break
                for task in tasks or []:
                    growth = asyncio.create_task(self._grow_one(job, board, task, finished))
                    running.add(growth)
                    growth.add_done_callback(ended)
                if not tasks or len(running) == job.concurrent_trees:
                    try:
                        async with asyncio.timeout(IDLE_S if not tasks else None):
                            await changed.wait()
                    except TimeoutError:
                        continue
        finally:
            flusher.cancel()
            for growth in running:
                growth.cancel()
        await self._flush(job, board, finished)

    async def _grow_one(self, job: SearchJob, board: Any, task: TreeTask, finished: _Finished) -> None:
        try:
            tree = await self._grow_tree(job, task)
        except InfrastructureError as error:
            key = TreeKey(task.problem.id, task.number)
            await board.give_back.remote(self.name, [(key, str(error))])
            return
        reference = ray.put(to_batch(tree))
        finished.trees.append(tree)
        finished.references.append(reference)
        await board.publish.remote([(summary_of(tree), [reference])])
        if len(finished.trees) >= PART_TREES:
            await self._flush(job, board, finished)

    async def _grow_tree(self, job: SearchJob, task: TreeTask) -> Tree:
        plan, problem = job.plan, task.problem
        bare = Problem(problem.id, "", problem.answers)  # what travels with every request
        augmented = plan.value is ValueKind.ppm
        fmt = format_named(job.format)
        [prompt] = await self.policy.encode([job.few_shot + fmt.prompt(problem.question)])
        tree = Tree(
            problem_id=problem.id,
            round=plan.round,
            number=task.number,
            seed=tree_seed(job.run_seed, plan.round, problem.id, task.number),
            prompt_ids=tuple(prompt),
            policy_digest=job.policy[1],
            ppm_digest=job.ppm[1] if job.ppm else "",
        )
        expander = Expander(
            policy=self.policy,
            verifier=self.verifier,
            format=fmt,
            sampling=job.sampling,
            candidates=plan.candidates,
            max_depth=job.max_depth,
            reward=self.reward if augmented else None,
        )
        rule = UCT(rollouts=task.rollouts, exploration=plan.exploration, augmented=augmented)
        await MCTS(expander, rule, job.concurrent_rollouts).grow(tree, bare)
        return tree

    async def _flush_regularly(self, job: SearchJob, board: Any, finished: _Finished) -> None:
        while True:
            await asyncio.sleep(PART_SECONDS)
            await self._flush(job, board, finished)

    async def _flush(self, job: SearchJob, board: Any, finished: _Finished) -> None:
        trees, finished.trees = finished.trees, []
        references, finished.references = finished.references, []
        if trees:
            name = f"part-{self.name}-{uuid.uuid4().hex[:8]}.parquet"
            part = await asyncio.to_thread(write_part, job.trees, name, trees)
            await board.durable.remote(part)
        del references

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters of this shard's engines and verifier."""
        services: dict[str, Any] = {"policy": self.policy, "verifier": self.verifier}
        if self.reward is not None:
            services["ppm"] = self.reward
        return {name: dict(await service.stats()) for name, service in services.items()}


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
        executions=sum(map(bool, tree.code)),
        infrastructure_failures=tree.infrastructure_failures,
    )
