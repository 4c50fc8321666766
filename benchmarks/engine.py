"""A real engine under search against the same engine given all the same prompts at once.

    python -m benchmarks.engine [--trees 400] [--json FILE] [--check]

The model is the tiny world's, pre-trained here for as long as it takes to write steps that parse; vLLM's CPU build
serves it. First a shard grows trees with it. Then a fresh engine, so that nothing is cached, gets the very requests
that the search made, all in one call, by depth: no search can beat that: it cannot ask for what it does not know yet.

How cores are made equal: in both runs the engine's process is bound to one core with one thread, and everything else
to the others. A core slows down when its neighbour works (they may be two threads of one, and share a cache and a clock
in any case), so while the prompts are answered all at once the other cores are kept as busy as they were during the
search, by processes that do nothing else. The ratio is of generated tokens a second, first request to last answer.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import scene
from benchmarks.common import Goal, beside, finish, local_ray, parser
from evolve.policy.checkpoint import digest
from evolve.policy.engine import PolicyEngine, Request
from evolve.schema import EngineConfig, Precision, ToyConfig
from evolve.search.seeds import derive
from evolve.search.shard import SearchJob
from evolve.service import get
from evolve.store.trees import read_part
from evolve.toy import seed_model
from evolve.toy.world import problems as toy_problems
from evolve.tree import Tree
from evolve.types import Problem

GOALS = [Goal("search_over_all_at_once", "at least", 0.8)]


class Pinned:
    """A policy engine whose process is bound to one core; made inside its actor."""

    def __init__(self, make: Callable[[], Any], core: int) -> None:
        bind({core})
        self._engine = make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def bind(cores: set[int]) -> None:
    """Bind every thread of this process, and what it starts from now on, to some cores."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


SPIN = """
import os, sys, time
core, share, period = int(sys.argv[1]), float(sys.argv[2]), 0.02
os.sched_setaffinity(0, {core})
while True:
    started = time.perf_counter()
    while time.perf_counter() < started + share * period:
        pass
    time.sleep((1 - share) * period)
"""
"""Keeps a core at work for a share of the time, on nothing."""


def requests_of(tree: Tree, job: SearchJob) -> list[tuple[int, Request]]:
    """What a search asked its policy for while it grew a tree, each with the depth of the node it continued."""
    return [
        (
            tree.depth[node],
            (
                tree.prefix_ids(node),
                job.plan.candidates,
                replace(job.sampling, seed=derive(tree.seed, *tree.continuation_ids(node))),
            ),
        )
        for node in range(len(tree))
        if tree.is_expanded(node)
    ]


def measure(
    make: Callable[[], Any], checkpoint: tuple[str, str], problems: Sequence[Problem], core: int, rollouts: int = 4
) -> dict[str, Any]:
    """Both runs, with engines that `make` makes, bound to a core; needs Ray."""
    with tempfile.TemporaryDirectory() as directory:
        job = scene.job_of(scene.plan(rollouts, 6), Path(directory), concurrent_trees=96)
        job = replace(job, policy=checkpoint, sampling=replace(job.sampling, max_tokens=96))
        member = scene.member(0, partial(Pinned, make, core), scene.sandbox(1))
        others = sorted(os.sched_getaffinity(0) - {core})
        psutil.cpu_times_percent(percpu=True)  # the next answer is for the time since this one
        _, search_s = scene.grow(scene.Still([member]), problems, job, poll_s=0.1)
        during = psutil.cpu_times_percent(percpu=True)
        shares = {n: 1 - (during[n].idle + during[n].iowait + during[n].steal) / 100 for n in others}
        search = member.stats()
        member.close()
        trees = [tree for part in sorted(Path(directory).glob("*.parquet")) for tree in read_part(part)]
    # By depth, so that what a step continues is cached by then, as it is in the search.
    by_depth = sorted((each for tree in trees for each in requests_of(tree, job)), key=lambda each: each[0])
    asked = [request for _, request in by_depth]
    answered = search["requests"] + search["refused"]
    if len(asked) != answered:
        raise RuntimeError(f"the trees tell of {len(asked)} requests, the engine of {answered:.0f}")
    member = scene.member(0, partial(Pinned, make, core), scene.SumVerifier)
    with beside([sys.executable, "-S", "-c", SPIN, str(n), str(share)] for n, share in shares.items()):
        started = time.monotonic()
        get(member.policy.call.remote("propose_many", asked), scene.TIMEOUT_S, "all prompts at once")
        once_s = time.monotonic() - started
    once = member.stats()
    member.close()
    rates = search["generated_tokens"] / search_s, once["generated_tokens"] / once_s
    return {
        "trees": len(trees),
        "requests": len(asked),
        "search_tokens": search["generated_tokens"],
        "all_at_once_tokens": once["generated_tokens"],
        "search_tokens_per_s": rates[0],
        "all_at_once_tokens_per_s": rates[1],
        "search_over_all_at_once": rates[0] / rates[1],
        "search_occupancy": search["occupancy"],
        "other_cores_busy": sum(shares.values()) / max(1, len(shares)),
        "engine_core": core,
    }


def main() -> int:
    made = parser("engine", __doc__)
    made.add_argument("--trees", type=int, default=400, help="trees to grow (400)")
    made.add_argument("--pretrain-steps", type=int, default=500, help="of the tiny model (500)")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        toy = ToyConfig(pretrain_steps=arguments.pretrain_steps)
        seed_model.build(toy, 0, model)
        config = EngineConfig(precision=Precision.fp32, max_model_len=768, max_num_seqs=256)
        make = partial(PolicyEngine, str(model), config, digest(model), "cpu")
        problems = toy_problems(arguments.trees, 7, "train", toy.difficulties, toy.operations)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            sys.exit("benchmarks.engine needs two cores: one for the engine, one for everything else")
        bind(set(cores[:-1]))
        os.environ["OMP_NUM_THREADS"] = "1"
        with local_ray():
            record = measure(make, (str(model), digest(model)), problems, cores[-1])
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
