"""Shards side by side: 1, 2, 4, 8 and 16 of them in real Ray actors, each on a pretended node of its own.

    python -m benchmarks.scaling [--shards 1 2 4 8 16] [--json FILE] [--check]

Every shard has a simulated engine, and every size grows the same number of trees a shard. All of it runs on this
machine, so the engines are slowed until its CPU is not the limit: a first run with an engine that answers at once
tells what a candidate costs, and the speed is chosen so that the largest size takes at most `LOAD` of the cores. The
speed is printed, and so is how many shards with engines at full speed one core can drive. Execution is stubbed out (a
node brings its own CPUs for that). Efficiency is trees a second and shard, over those of one shard.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
SLOTS = 64
GOALS = [Goal("efficiency_at_most_shards", "at least", 0.9), Goal("driver_ms_per_tree_ratio", "at most", 1.1)]


class Node(SimulatedPolicy):
    """An engine and a stubbed verifier in one process: sixteen nodes are to fit one machine's memory."""

    def __init__(self, speed: float) -> None:
        super().__init__(scene.CHECKPOINT[0], EngineConfig(max_num_seqs=SLOTS), speed=speed)
        self._verifier = scene.SumVerifier()

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        """As `SumVerifier`."""
        return await self._verifier.check(problem, parent, step)

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        """As `SumVerifier`."""
        return await self._verifier.grade(problem, answer)


@contextmanager
def pretended_nodes(count: int) -> Iterator[list[str]]:
    """A Ray cluster of this machine's own with so many nodes; yields their ids."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, resources={"shard": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes(timeout=300)
        yield [node["NodeID"] for node in ray.nodes() if node["Alive"] and "shard" in node["Resources"]]
    finally:
        ray.shutdown()
        for node in [*cluster.worker_nodes, cluster.head_node]:
            cluster.remove_node(node, allow_graceful=False)  # gracefully each takes half a minute
        cluster.shutdown()  # a cluster that is gone is no longer the one that a plain `ray.init()` joins


def one_size(shards: int, trees_a_shard: int, speed: float, at_once: int) -> dict[str, Any]:
    """One cluster of so many nodes, from its start to its end."""
    with pretended_nodes(shards) as nodes, tempfile.TemporaryDirectory() as directory:
        members = []
        for number, node in enumerate(nodes):
            placed = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
            members.append(scene.member(number, partial(Node, speed), None, placed))
        job = scene.job_of(scene.plan(rollouts=4), Path(directory, "trees"), at_once)
        warm = scene.job_of(job.plan, Path(directory, "warm"), at_once)
        scene.grow(members, sum_problems(2 * shards, 4), warm)
        before, requests = cpu_seconds(), total(members, "requests")
        progress, seconds = scene.grow(members, sum_problems(trees_a_shard * shards, 5), job)
        requests = total(members, "requests") - requests
        parts = spent(before, cpu_seconds())
        a_candidate = total(members, "generated_tokens") / total(members, "requests") / job.plan.candidates
        for member in members:
            member.close()
    candidates = requests * job.plan.candidates
    return {
        "shards": shards,
        "trees": progress.trees,
        "seconds": seconds,
        "trees_per_s": progress.trees / seconds,
        "candidates_per_s": candidates / seconds,
        "tokens_per_candidate": a_candidate,
        "cpu_ms_per_candidate": sum(parts.values()) * 1e3 / candidates,
        "driver_ms_per_tree": parts.get("driver", 0.0) * 1e3 / progress.trees,
        "board_ms_per_tree": parts.get("Board", 0.0) * 1e3 / progress.trees,
        "cores_used": sum(parts.values()) / seconds,
    }


def total(members: Sequence[scene.Member], counter: str) -> float:
    """A counter of all engines together."""
    return sum(member.stats()[counter] for member in members)


def measure(sizes: Sequence[int], trees_a_shard: int = 40, at_once: int = 20) -> dict[str, Any]:
    """All sizes, one after the other; starts clusters of its own."""
    free = one_size(1, trees_a_shard, math.inf, at_once)
    rates, cost_s = Rates(), free["cpu_ms_per_candidate"] / 1e3
    tokens_per_s = SLOTS / (rates.iteration_s + SLOTS * rates.sequence_s)
    full_rate = tokens_per_s / free["tokens_per_candidate"]
    cores = len(os.sched_getaffinity(0))
    speed = min(1.0, LOAD * cores / (max(sizes) * full_rate * cost_s))
    rows = [one_size(size, trees_a_shard, speed, at_once) for size in sizes]
    for row in rows:
        row["efficiency"] = row["trees_per_s"] / row["shards"] / (rows[0]["trees_per_s"] / rows[0]["shards"])
        row["driver_ratio"] = row["driver_ms_per_tree"] / rows[0]["driver_ms_per_tree"]
    return {
        "speed": speed,
        "full_rate_shards_per_core": 1 / (full_rate * cost_s),
        "most_shards": rows[-1]["shards"],
        "efficiency_at_most_shards": rows[-1]["efficiency"],
        "driver_ms_per_tree_ratio": rows[-1]["driver_ratio"],
        "rows": rows,
    }


def main() -> int:
    made = parser("scaling", __doc__)
    made.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes (1 2 4 8 16)")
    made.add_argument("--trees", type=int, default=40, help="trees a shard (40)")
    arguments = made.parse_args()
    record = measure(sorted(arguments.shards), arguments.trees)
    show_rows(
        f"engines at {record['speed']:.2f} of full speed",
        record["rows"],
        {
            "shards": "shards",
            "seconds": "seconds",
            "trees_per_s": "trees/s",
            "efficiency": "efficiency",
            "driver_ms_per_tree": "driver ms/tree",
            "board_ms_per_tree": "board ms/tree",
            "cpu_ms_per_candidate": "CPU ms/candidate",
            "cores_used": "cores used",
        },
    )
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
