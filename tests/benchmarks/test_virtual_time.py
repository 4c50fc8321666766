"""Saturation in virtual time: the goal of `benchmarks.saturation`, whatever else this machine does.

The shard, the board and the simulated engine are the real ones, in one process without Ray. The clock of the event
loop jumps to the next timer as soon as nothing is left to be done, so that computing takes no time; a call to the
board and an execution take as long as they are said to.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from benchmarks import saturation, scene
from evolve.policy.formats import format_named
from evolve.policy.simulated import SimulatedPolicy, sum_problems
from evolve.search import shard
from evolve.search.board import Board
from evolve.search.budget import EscalatingBudget
from evolve.search.expand import Expander
from evolve.search.shard import SearchJob
from evolve.store.trees import Part, TreeKey
from evolve.types import Outcome, Problem, Verdict

SLOTS, TREES, AT_ONCE = 256, 160, 96
CALL_S, EXECUTION_S, GRADE_S = 0.002, 0.05, 0.01
JOB = scene.job_of(scene.plan(rollouts=2), Path("none"), AT_ONCE)

T = TypeVar("T")


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop that never waits."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready:
            due = min((timer._when for timer in self._scheduled if not timer._cancelled), default=self._now)
            self._now = max(self._now, due) + 1e-5  # beyond it: sums of floats may fall short of it
        super()._run_once()


class SlowVerifier(scene.SumVerifier):
    """Takes its time, now more, now less."""

    def __init__(self) -> None:
        super().__init__()
        self._rng = Random(0)

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        await asyncio.sleep(self._rng.expovariate(1 / EXECUTION_S))
        return await super().check(problem, parent, step)

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        await asyncio.sleep(GRADE_S)
        return await super().grade(problem, answer)


def remote(method: Callable[..., Any]) -> SimpleNamespace:
    """A method as an actor's: asked for with `.remote`, and not answered at once."""

    async def call(*arguments: Any) -> Any:
        await asyncio.sleep(CALL_S)
        return method(*arguments)

    return SimpleNamespace(remote=call)


async def by_shards(problems: Sequence[Problem], job: SearchJob, policies: Sequence[SimulatedPolicy]) -> int:
    """Grow the trees by as many shards as there are engines; returns how many rollouts they had."""
    board = Board(EscalatingBudget(job.plan), problems, (), job.trees)
    calls = SimpleNamespace(**{name: remote(getattr(board, name)) for name in ("take", "publish", "durable")})

    async def one(name: str, policy: SimulatedPolicy) -> None:
        candidates = job.plan.candidates
        expander = Expander(policy, SlowVerifier(), format_named(job.format), job.sampling, candidates, job.max_depth)
        await shard._Round(name, job, calls, expander).run()

    await asyncio.gather(*(one(f"shard-{number}", policy) for number, policy in enumerate(policies)))
    assert board.progress().done
    return board.progress().rollouts


async def by_a_shard(problems: Sequence[Problem], job: SearchJob, policy: SimulatedPolicy) -> int:
    return await by_shards(problems, job, [policy])


async def in_lockstep(problems: Sequence[Problem], job: SearchJob, policy: SimulatedPolicy) -> int:
    return await saturation.grow_batches(policy, SlowVerifier(), problems, job)


def in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    loop = VirtualTime()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def busy(grow: Callable[..., Coroutine[Any, Any, int]]) -> tuple[float, float, int]:
    """Share of busy slots from 5 % to 90 % of the run, its model seconds, and how many rollouts there were."""

    async def run() -> tuple[float, float, int]:
        policy = scene.engine(SLOTS, 1.0)()
        rollouts = await grow(sum_problems(TREES, 3), JOB, policy)
        timeline = await policy.timeline()
        return saturation.busy_share(timeline, SLOTS, saturation.FROM, saturation.TO), timeline[-1][0], rollouts

    return in_virtual_time(run())


@pytest.fixture(autouse=True)
def no_ray_and_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def keep_nothing(directory: Path, stem: str, trees: Sequence[Any]) -> Part:
        return Part(stem, tuple(TreeKey(tree["problem_id"][0].as_py(), tree["tree"][0].as_py()) for tree in trees))

    monkeypatch.setattr(shard, "ray", SimpleNamespace(put=lambda batch: batch))
    monkeypatch.setattr(shard, "write_part", keep_nothing)
    monkeypatch.setattr(asyncio, "to_thread", at_once)


def test_a_shard_keeps_an_engines_slots_busy_where_lockstep_does_not() -> None:
    share, seconds, rollouts = busy(by_a_shard)
    lockstep_share, lockstep_seconds, lockstep_rollouts = busy(in_lockstep)
    assert rollouts == lockstep_rollouts == 2 * TREES
    [goal] = saturation.GOALS
    assert goal.met({"busy": share}), share
    assert lockstep_share < 0.8
    assert lockstep_seconds > 1.2 * seconds


def test_a_tail_of_escalated_trees_fills_the_engine_with_more_rollouts_at_once() -> None:
    plan = replace(JOB.plan, candidates=4, escalation=(16,))

    async def run(tail: int) -> tuple[float, float, int]:
        policy = scene.engine(32, 1.0)()
        job = replace(JOB, plan=plan, concurrent_trees=12, tail_rollouts=tail)
        rollouts = await by_a_shard(sum_problems(16, 3), job, policy)
        timeline = await policy.timeline()
        return saturation.busy_share(timeline, 32, saturation.FROM, saturation.TO), timeline[-1][0], rollouts

    share, seconds, rollouts = in_virtual_time(run(1))
    wide_share, wide_seconds, wide_rollouts = in_virtual_time(run(8))
    assert share < 0.6
    assert wide_share > 0.9
    assert wide_seconds < 0.7 * seconds
    assert wide_rollouts == rollouts


def test_stragglers_leave_no_other_shard_idle_at_the_end_of_a_round() -> None:
    async def ends() -> list[float]:
        policies = [scene.engine(64, 1.0)() for _ in range(4)]
        await by_shards(sum_problems(96, 3), replace(JOB, concurrent_trees=24), policies)
        ended = []
        for policy in policies:
            timeline = await policy.timeline()
            ended.append(next(at for at, busy in timeline if busy >= timeline[-1][1]))
        return ended

    ended = in_virtual_time(ends())
    assert min(ended) > 0.85 * max(ended), ended
