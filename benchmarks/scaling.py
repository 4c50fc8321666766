"""Shards side by side: 1, 2, 4, 8 and 16 of them in real Ray actors, each on a pretended node of its own.

    python -m benchmarks.scaling [--shards 1 2 4 8 16] [--json FILE] [--check]

Every shard has a simulated engine, and every size grows the same problems over again for every shard. All of it runs on
this machine, so the shards are small (`SLOTS` slots) and their engines are slowed until its CPU is not the limit: a run
of one at full speed tells what it takes, and the speed is chosen so that the largest size takes at most `LOAD` of the
cores. The factor is printed. How many shards one core can drive is measured with one of full size (`FULL_SLOTS`) at
full speed. Execution is stubbed out (a node brings its own CPUs for that). Efficiency is trees a second and shard, over
those of one shard. The driver's CPU a tree is held against the least of any smaller size: what it takes however few
trees there are, for it looks after them twice a second, would hide in the cost with one shard.

A candidate's cost is that of driver, board, shards and services. What Ray's own processes take (some per cent of a
core a node, whatever is done there) is shown beside it: on a real cluster each node pays for its own.

The pretended nodes are of one cluster, which grows with the sizes: a raylet takes CPU, too.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks import scene
from benchmarks.common import Goal, cpu_seconds, finish, parser, show_rows, spent
from evolve.policy.batching import Rates
from evolve.policy.simulated import SimulatedPolicy, sum_problems
from evolve.schema import EngineConfig
from evolve.types import Outcome, Problem, Verdict

LOAD = 0.5
"""Share of this machine's cores that the largest size may take."""
SLOTS, FULL_SLOTS = 32, 256
AT_ONCE, FULL_AT_ONCE = 6, 48
"""Trees that a shard grows at once: with eight candidates each, more than its slots hold."""
OURS = ("driver", "Board", "Shard", "ServiceHost")
"""Processes whose CPU time a candidate costs; the others are Ray's."""
MOST = 16
"""Shards at which the goals are set."""
GOALS = [Goal("efficiency_at_most_shards", "at least", 0.9), Goal("driver_ms_per_tree_ratio", "at most", 1.1)]


class Node(SimulatedPolicy):
    """An engine and a stubbed verifier in one process: sixteen nodes are to fit one machine's memory."""

    def __init__(self, slots: int, speed: float) -> None:
        super().__init__(scene.CHECKPOINT[0], EngineConfig(max_num_seqs=slots), speed=speed)
        self._verifier = scene.SumVerifier()

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        """As `SumVerifier`."""
        return await self._verifier.check(problem, parent, step)

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        """As `SumVerifier`."""
        return await self._verifier.grade(problem, answer)


@contextmanager
def pretended_nodes() -> Iterator[Callable[[int], list[str]]]:
    """A Ray cluster of this machine's own; yields what makes it so many nodes, its head aside, and tells their ids."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)

    def grow(count: int) -> list[str]:
        while len(cluster.worker_nodes) < count:
            cluster.add_node(num_cpus=1, resources={"shard": 1})
        cluster.wait_for_nodes(timeout=300)
        found = [node["NodeID"] for node in ray.nodes() if node["Alive"] and "shard" in node["Resources"]]
        return sorted(found)[:count]

    try:
        yield grow
    finally:
        ray.shutdown()
        for node in [*cluster.worker_nodes, cluster.head_node]:
            cluster.remove_node(node, allow_graceful=False)  # gracefully each takes half a minute
        cluster.shutdown()  # a cluster that is gone is no longer the one that a plain `ray.init()` joins


def one_size(nodes: Sequence[str], trees_a_shard: int, speed: float, full_size: bool = False) -> dict[str, Any]:
    """A shard on each of these nodes, from their start to their end."""
    shards = len(nodes)
    slots, at_once = (FULL_SLOTS, FULL_AT_ONCE) if full_size else (SLOTS, AT_ONCE)
    with tempfile.TemporaryDirectory() as directory:
        members = []
        for number, node in enumerate(nodes):
            placed = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
            members.append(scene.member(number, partial(Node, slots, speed), None, placed))
        job = scene.job_of(scene.plan(rollouts=1), Path(directory, "trees"), at_once)
        warm = scene.job_of(scene.plan(rollouts=1, candidates=2), Path(directory, "warm"), at_once)
        fleet = scene.Still(members)
        scene.grow(fleet, sum_problems(shards, 4, longest=3), warm)
        before, counted = cpu_seconds(), {name: total(members, name) for name in ("requests", "generated_tokens")}
        problems = [
            replace(problem, id=f"{problem.id}-{copy}")
            for problem in sum_problems(trees_a_shard, 5)
            for copy in range(shards)
        ]
        after: dict[str, float] = {}
        progress, seconds = scene.grow(fleet, problems, job, lambda p: after.update(cpu_seconds()) if p.done else None)
        parts = spent(before, after)
        candidates = (total(members, "requests") - counted["requests"]) * job.plan.candidates
        tokens = total(members, "generated_tokens") - counted["generated_tokens"]
        occupancy = total(members, "occupancy") / shards
        for member in members:
            member.close()
    return {
        "shards": shards,
        "trees": progress.trees,
        "seconds": seconds,
        "trees_per_s": progress.trees / seconds,
        "candidates_per_s": candidates / seconds,
        "tokens_per_candidate": tokens / candidates,
        "occupancy": occupancy,
        "cpu_ms_per_candidate": sum(parts.get(name, 0.0) for name in OURS) * 1e3 / candidates,
        "driver_ms_per_tree": parts.get("driver", 0.0) * 1e3 / progress.trees,
        "board_ms_per_tree": parts.get("Board", 0.0) * 1e3 / progress.trees,
        "cores_used": sum(parts.values()) / seconds,
        "cores_used_by_ray": sum(value for name, value in parts.items() if name not in OURS) / seconds,
    }


def total(members: Sequence[scene.Member], counter: str) -> float:
    """A counter of all engines together."""
    return sum(member.stats()[counter] for member in members)


def measure(
    sizes: Sequence[int], trees_a_shard: int = 20, full_trees: int = 64, full_speed: float = 1.0
) -> dict[str, Any]:
    """All sizes, one after the other, in a cluster of their own; engines are `full_speed` times real at most."""
    with pretended_nodes() as nodes:
        full = one_size(nodes(1), full_trees, full_speed, full_size=True)
        paced = one_size(nodes(1), trees_a_shard, full_speed)
        wanted = max(sizes) * paced["candidates_per_s"] * paced["cpu_ms_per_candidate"] / 1e3
        speed = full_speed * min(1.0, LOAD * len(os.sched_getaffinity(0)) / wanted)
        rows = [one_size(nodes(size), trees_a_shard, speed) for size in sizes]
    rates = Rates()
    tokens_per_s = FULL_SLOTS / (rates.iteration_s + FULL_SLOTS * rates.sequence_s)
    full_rate = tokens_per_s / full["tokens_per_candidate"]
    for row in rows:
        row["efficiency"] = row["trees_per_s"] / row["shards"] / (rows[0]["trees_per_s"] / rows[0]["shards"])
    return {
        "speed": speed,
        "slow_down_factor": 1 / speed,
        "full_size_ms_per_candidate": full["cpu_ms_per_candidate"],
        "full_size_shards_per_core": 1e3 / (full_rate * full["cpu_ms_per_candidate"]),
        "most_shards": rows[-1]["shards"],
        "efficiency_at_most_shards": rows[-1]["efficiency"],
        "driver_ms_per_tree_ratio": rows[-1]["driver_ms_per_tree"]
        / min(row["driver_ms_per_tree"] for row in rows[:-1] or rows),
        "rows": rows,
    }


def main() -> int:
    made = parser("scaling", __doc__)
    made.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes (1 2 4 8 16)")
    made.add_argument("--trees", type=int, default=20, help="trees a shard (20)")
    arguments = made.parse_args()
    if arguments.check and (max(arguments.shards) < MOST or 1 not in arguments.shards):
        made.error(f"--check needs sizes from 1 to {MOST}: the goals are set there")
    record = measure(sorted(arguments.shards), arguments.trees)
    show_rows(
        f"engines at {record['speed']:.2f} of full speed",
        record["rows"],
        {
            "shards": "shards",
            "seconds": "seconds",
            "trees_per_s": "trees/s",
            "efficiency": "efficiency",
            "occupancy": "engine full",
            "driver_ms_per_tree": "driver ms/tree",
            "board_ms_per_tree": "board ms/tree",
            "cpu_ms_per_candidate": "CPU ms/candidate",
            "cores_used": "cores used",
            "cores_used_by_ray": "by Ray itself",
        },
    )
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
