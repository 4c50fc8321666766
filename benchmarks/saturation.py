"""How busy the search keeps an engine: slot-seconds in use, beside a lockstep schedule over the same trees.

    python -m benchmarks.saturation [--trees 160] [--speed 1] [--json FILE] [--check]

The engine is simulated (`evolve.policy.simulated`: 256 slots, a 7B model on one 80 GB GPU); shard, board, services and
the sandboxed verifier are the real ones, and so are the verifier's latencies. A slot is busy while it holds a sequence.
Counted between 5 % and 90 % of the run, so that neither the first prompts nor the last trees are; the tail, the last
10 %, is shown beside it. With a speed above 1 the verifier's latencies weigh that much more, for the engine is that
much faster. It takes about five minutes, two of them for the shard.

The baseline advances the trees in lockstep, as the reference implementation does: a batch of as many trees as the
shard grows at once; all generate, then all execute, then all generate again, until the whole batch is done.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import scene
from benchmarks.common import Goal, finish, local_ray, parser, show_rows
from evolve.policy.formats import format_named
from evolve.policy.simulated import sum_problems
from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.rules import rule_of
from evolve.search.seeds import tree_seed
from evolve.search.shard import SearchJob
from evolve.service import RemotePolicy, RemoteVerifier, ServiceClient, get
from evolve.tree import Tree
from evolve.types import Candidate, Policy, Problem, Sampling, Verifier

GOALS = [Goal("busy", "at least", 0.95)]
FROM, TO = 0.05, 0.90


@dataclass(slots=True)
class Gate:
    """Lets nobody through before everybody has come."""

    parties: int
    arrived: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_together(self) -> None:
        """Wait for all the others."""
        self.arrived += 1
        opened = self.opened
        self._open_if_all()
        await opened.wait()

    def leave(self) -> None:
        """Nobody waits for this party any more."""
        self.parties -= 1
        self._open_if_all()

    def _open_if_all(self) -> None:
        if self.arrived >= self.parties:
            self.arrived = 0
            self.opened.set()
            self.opened = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Lockstep:
    """A policy that answers all trees at once: generation begins when every tree waits for it, and ends for all."""

    policy: Policy
    gate: Gate

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        """As the policy, between two gates."""
        await self.gate.pass_together()
        found = await self.policy.propose(prefixes, n, sampling)
        await self.gate.pass_together()
        return found

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """As the policy."""
        return await self.policy.encode(texts)


async def grow_in_lockstep(member: scene.Member, problems: Sequence[Problem], job: SearchJob) -> int:
    """The same trees as a shard grows, a batch of them after the other; returns how many rollouts they had."""
    policy = RemotePolicy(ServiceClient(member.policy, "policy engine", scene.TIMEOUT_S, expects=job.policy))
    verifier = RemoteVerifier(ServiceClient(member.verifier, "verifier", scene.TIMEOUT_S))
    return await grow_batches(policy, verifier, problems, job)


async def grow_batches(policy: Policy, verifier: Verifier, problems: Sequence[Problem], job: SearchJob) -> int:
    """As `grow_in_lockstep`, with any policy and verifier."""
    fmt, rollouts = format_named(job.format), 0

    async def one(problem: Problem, gate: Gate) -> int:
        try:
            [prompt] = await policy.encode([fmt.prompt(problem.question)])
            tree = Tree(problem.id, 1, 0, tree_seed(job.run_seed, 1, problem.id, 0), tuple(prompt))
            expander = Expander(Lockstep(policy, gate), verifier, fmt, job.sampling, job.plan.candidates, job.max_depth)
            await MCTS(expander, rule_of(job.plan, job.plan.rollouts)).grow(tree, problem)
            return tree.rollouts
        finally:
            gate.leave()

    for first in range(0, len(problems), job.concurrent_trees):
        batch = problems[first : first + job.concurrent_trees]
        gate = Gate(len(batch))
        rollouts += sum(await asyncio.gather(*(one(problem, gate) for problem in batch)))
    return rollouts


def busy_share(timeline: Sequence[tuple[float, float]], slots: int, begin: float, end: float) -> float:
    """Share of slot-seconds in use between two shares of a run; the run ends with its last busy slot."""
    last = timeline[-1][1]
    ended = next(at for at, busy in timeline if busy >= last)
    times = [at for at, _ in timeline]

    def until(moment: float) -> float:
        place = min(bisect_left(times, moment), len(times) - 1)
        (t0, b0), (t1, b1) = timeline[max(place - 1, 0)], timeline[place]
        return b1 if t1 <= t0 else b0 + (b1 - b0) * (moment - t0) / (t1 - t0)

    span = (end - begin) * ended
    return (until(end * ended) - until(begin * ended)) / (slots * span) if span else 0.0


def one_schedule(
    schedule: str, problems: Sequence[Problem], slots: int, speed: float, rollouts: int, at_once: int, trees: Path
) -> dict[str, Any]:
    """Grow the trees under one schedule with an engine of its own."""
    member = scene.member(0, scene.engine(slots, speed), scene.sandbox())
    job = scene.job_of(scene.plan(rollouts), trees, at_once)
    started = time.monotonic()
    if schedule == "shard":
        done = scene.grow(scene.Still([member]), problems, job)[0].rollouts
    else:
        done = asyncio.run(grow_in_lockstep(member, problems, job))
    seconds = time.monotonic() - started
    timeline = get(member.policy.call.remote("timeline"), 60, "the engine's record")
    stats = member.stats()
    member.close()
    return {
        "schedule": schedule,
        "rollouts": done,
        "tokens": stats["generated_tokens"],
        "cached": stats["cached_tokens"] / stats["prompt_tokens"],
        "seconds": seconds,
        "busy": busy_share(timeline, slots, FROM, TO),
        "tail": busy_share(timeline, slots, TO, 1.0),
        "whole": busy_share(timeline, slots, 0.0, 1.0),
    }


def measure(trees: int, slots: int = 256, speed: float = 1.0, rollouts: int = 2, at_once: int = 96) -> dict[str, Any]:
    """Both schedules; needs Ray."""
    problems = sum_problems(trees, 3)
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            one_schedule(name, problems, slots, speed, rollouts, at_once, Path(directory, name))
            for name in ("shard", "lockstep")
        ]
    ours, theirs = rows
    if ours["rollouts"] != theirs["rollouts"] or ours["tokens"] != theirs["tokens"]:
        raise RuntimeError(f"the two schedules did not grow the same trees: {rows}")
    return {
        "trees": trees,
        "slots": slots,
        "speed": speed,
        "candidates_in_flight_a_slot": at_once * scene.plan().candidates / slots,
        "busy": ours["busy"],
        "busy_in_tail": ours["tail"],
        "busy_whole_run": ours["whole"],
        "lockstep_busy": theirs["busy"],
        "busy_ratio": ours["busy"] / theirs["busy"],
        "time_ratio": theirs["seconds"] / ours["seconds"],
        "rows": rows,
    }


def main() -> int:
    made = parser("saturation", __doc__)
    made.add_argument("--trees", type=int, default=160, help="trees of each schedule (160)")
    made.add_argument("--speed", type=float, default=1.0, help="how much faster than real the engine is (1)")
    arguments = made.parse_args()
    with local_ray():
        record = measure(arguments.trees, speed=arguments.speed)
    show_rows(
        "share of slot-seconds in use",
        record["rows"],
        {
            "schedule": "schedule",
            "busy": "5 % to 90 % of the run",
            "tail": "last 10 %",
            "whole": "whole run",
            "seconds": "seconds",
            "cached": "prompt tokens cached",
        },
    )
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
