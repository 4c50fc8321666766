"""The real actors of a search (board, shards, service hosts) around a simulated engine, set up in one call."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from evolve.health import Limits
from evolve.policy.batching import Rates
from evolve.policy.formats import format_named
from evolve.policy.simulated import SimulatedPolicy
from evolve.schema import EngineConfig, Generator, ValueKind, VerifierConfig
from evolve.search.board import Board, Progress
from evolve.search.budget import EscalatingBudget
from evolve.search.shard import SearchJob, Shard
from evolve.service import ServiceHost, get
from evolve.stages.growing import Growing, Shards
from evolve.store.parts import mended_parts
from evolve.types import Outcome, Problem, RoundPlan, Sampling, Status, Verdict
from evolve.verify.service import SandboxVerifier
from evolve.watch import Watch

TIMEOUT_S = 3600.0
START_S = 300.0
_LAST_NUMBER = re.compile(r"\d+")
CHECKPOINT = ("simulated", "simulated")


class SumVerifier:
    """A `Verifier` that knows what the simulated policy's code does, and answers at once: execution stubbed out."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        """As the code would end: `+ rest` is a NameError, the last step prints the sum."""
        self._counts["executions"] += 1
        if step.endswith("+ rest"):
            return Verdict(Status.ERROR, exception="NameError")
        if not step.endswith("print(total)"):
            return Verdict(Status.OK)
        return Verdict(Status.OK, stdout=str(sum(int(_LAST_NUMBER.findall(code)[-1]) for code in parent)))

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        """By equality of text."""
        return Outcome.CORRECT if answer in problem.answers else Outcome.WRONG

    async def group(self, answers: Sequence[str]) -> list[int]:
        """By equality of text."""
        return [answers.index(answer) for answer in answers]

    async def stats(self) -> Mapping[str, float]:
        """Executions so far."""
        return dict(self._counts)


@dataclass(frozen=True, slots=True)
class Member:
    """One shard and its services."""

    name: str
    shard: Any
    policy: Any
    verifier: Any

    def stats(self) -> dict[str, float]:
        """The engine's counters."""
        found: dict[str, float] = get(self.policy.call.remote("stats"), 60, "the engine's statistics")
        return found

    def close(self) -> None:
        """End the actors."""
        ray.kill(self.shard)
        for actor in dict.fromkeys((self.policy, self.verifier)):
            ray.wait([actor.close.remote()], timeout=30)
            ray.kill(actor)


def sandbox(supervisors: int | None = None) -> Callable[[], Any]:
    """Makes the real verifier."""
    return partial(SandboxVerifier, VerifierConfig(supervisors=supervisors))


def engine(slots: int, speed: float) -> Callable[[], Any]:
    """Makes a simulated engine with the default rates."""
    return partial(SimulatedPolicy, CHECKPOINT[0], EngineConfig(max_num_seqs=slots), rates=Rates(), speed=speed)


def member(
    number: int, policy: Callable[[], Any], verifier: Callable[[], Any] | None, options: Mapping[str, Any] | None = None
) -> Member:
    """Start one shard with its services; `options` go to all actors. Without a verifier the policy's host is both."""
    settings = {"num_cpus": 0, **(options or {})}
    hosts: list[Any] = [
        ray.remote(ServiceHost).options(max_concurrency=1000, **settings).remote(make)
        for make in (policy, verifier)
        if make is not None
    ]
    get([host.start.remote() for host in hosts], 120, "the simulated services")
    name = f"shard-{number}"
    arguments = (name, hosts[0], hosts[-1], None, TIMEOUT_S)
    shard = ray.remote(Shard).options(max_concurrency=100, **settings).remote(*arguments)
    return Member(name, shard, hosts[0], hosts[-1])


def plan(rollouts: int = 8, candidates: int = 8) -> RoundPlan:
    """A terminal-guided round with one tree a problem."""
    return RoundPlan(1, Generator.previous, ValueKind.terminal, rollouts, candidates, 2.0, 1, 0, ())


def job_of(round_plan: RoundPlan, trees: Path, concurrent_trees: int, concurrent_rollouts: int = 1) -> SearchJob:
    """How the shards are to grow the trees."""
    stop = format_named("printed").stop
    return SearchJob(
        plan=round_plan,
        run_seed=0,
        format="printed",
        few_shot="",
        sampling=Sampling(max_tokens=160, stop=stop),
        max_depth=16,
        context=EngineConfig().max_model_len,
        concurrent_trees=concurrent_trees,
        concurrent_rollouts=concurrent_rollouts,
        tail_rollouts=1,
        trees=trees,
        policy=CHECKPOINT,
        ppm=None,
    )


class Still:
    """Members as a fleet that no node joins or leaves; their actors are watched as a fleet's are."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.groups = members
        self.watch = Watch(Limits(restarts=0, window_s=60.0, suspect_s=60.0, silence_s=300.0))
        for one in members:
            for role in ("shard", "policy", "verifier"):
                self.watch.add(f"{role} of {one.name}", getattr(one, role), START_S, hosted=False)

    def poll(self) -> None:
        """Look after the actors."""
        self.watch.poll()


def grow(
    fleet: Shards,
    problems: Sequence[Problem],
    job: SearchJob,
    watch: Callable[[Progress], None] | None = None,
    poll_s: float = 0.2,
) -> tuple[Progress, float]:
    """Grow a tree for every problem as a driver does; returns the final progress and the seconds it took.

    `watch` sees the progress now and then, and at the end, when the board still lives.
    """
    job.trees.mkdir(parents=True, exist_ok=True)
    made = ray.remote(Board).options(num_cpus=0)
    ids = {problem.id for problem in problems}
    board = lambda _: (made.remote(EscalatingBudget(job.plan), problems, (), job.trees), 300.0)  # noqa: E731
    growing = Growing(fleet, job, board, ids)
    started = time.monotonic()
    try:
        while not growing.poll():
            if time.monotonic() - started > TIMEOUT_S:
                raise TimeoutError(f"the trees were not grown within {TIMEOUT_S:.0f} s")
            if watch is not None and growing.latest is not None:
                watch(growing.latest)
            time.sleep(poll_s)
        seconds = time.monotonic() - started
        progress = growing.latest
        assert progress is not None
        if watch is not None:
            watch(progress)
    finally:
        growing.close()
    if (found := mended_parts(job.trees).count) != progress.trees:
        raise RuntimeError(f"{progress.trees} trees were counted, and there are {found}")
    return progress, seconds
