"""A shard and its board as Ray actors, with doubles for the engine and the verifier."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evolve.schema import Generator, ValueKind
from evolve.search.board import Board
from evolve.search.budget import EscalatingBudget
from evolve.search.seeds import derive
from evolve.search.shard import SearchJob, Shard
from evolve.service import ServiceHost
from evolve.store.trees import read_part
from evolve.tree import Tree
from evolve.types import Candidate, Outcome, Problem, RoundPlan, Sampling, Status, Verdict

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = ("a = 1\n<end_of_step>", "a = 2\n<end_of_step>", "print(3)\n<end_of_code>", "print(4)\n<end_of_code>")


class Policy:
    """Samples from a handful of steps by seed and prefix."""

    digest = "policy"

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        rng = Random(derive(sampling.seed, prefixes))
        await asyncio.sleep(0.002 * rng.random())
        texts = [rng.choice(STEPS) for _ in range(n)]
        return [[Candidate(t, tuple(map(ord, t)), (-0.5,) * len(t)) for t in texts]]

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, text)) for text in texts]

    async def stats(self) -> Mapping[str, float]:
        return {"generated_tokens": 1.0, "occupancy": 0.5}


class Verifier:
    """Runs everything; prints what the code says."""

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        return Verdict(Status.OK, stdout=step.removeprefix("print(").removesuffix(")") if "print" in step else "")

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        return Outcome.CORRECT if answer in problem.answers else Outcome.WRONG

    async def stats(self) -> Mapping[str, float]:
        return {"executions": 1.0}


def grow(directory: Path, problems: Sequence[Problem], shards: int = 1) -> tuple[list[Tree], Any]:
    import ray

    def actor(kind: type, *arguments: Any) -> Any:
        return ray.remote(kind).options(num_cpus=0, max_concurrency=100).remote(*arguments)

    plan = RoundPlan(1, Generator.previous, ValueKind.terminal, 6, 4, 2.0, 1, 0, ())
    job = SearchJob(
        plan=plan,
        run_seed=5,
        format="printed",
        few_shot="",
        sampling=Sampling(stop=("<end_of_step>", "<end_of_code>")),
        max_depth=6,
        concurrent_trees=8,
        concurrent_rollouts=1,
        tail_rollouts=1,
        trees=directory,
        policy=("/checkpoint", "policy"),
        ppm=None,
    )
    board = ray.remote(Board).options(num_cpus=0).remote(EscalatingBudget(plan), problems, (), directory, shards)
    made = [
        actor(Shard, f"shard-{i}", actor(ServiceHost, Policy), actor(ServiceHost, Verifier), None, 60.0)
        for i in range(shards)
    ]
    ray.get([shard.grow.remote(job, board) for shard in made], timeout=120)
    progress = ray.get(board.progress.remote())
    trees = [tree for part in sorted(directory.glob("*.parquet")) for tree in read_part(part)]
    return sorted(trees, key=lambda tree: tree.problem_id), progress


def test_every_problem_gets_its_tree_and_all_trees_are_durable(tmp_path: Path) -> None:
    problems = [Problem(f"p{i:02}", f"question {i}", ("3",)) for i in range(30)]
    trees, progress = grow(tmp_path, problems, shards=2)
    assert [tree.problem_id for tree in trees] == [problem.id for problem in problems]
    assert progress.done
    assert progress.trees == 30
    assert progress.rollouts == sum(tree.rollouts for tree in trees)


def test_problems_with_the_same_question_are_kept_apart(tmp_path: Path) -> None:
    twins = [Problem("first", "same text", ("3",)), Problem("second", "same text", ("5",))]
    trees, progress = grow(tmp_path, twins)
    assert [tree.problem_id for tree in trees] == ["first", "second"]
    assert trees[0].solved
    assert not trees[1].solved
    assert trees[0].text != trees[1].text
    assert progress.solved == 1


def test_the_trees_do_not_depend_on_how_many_shards_grew_them(tmp_path: Path) -> None:
    problems = [Problem(f"p{i:02}", f"question {i}", ("3",)) for i in range(12)]
    (one, _), (two, _) = grow(tmp_path / "one", problems), grow(tmp_path / "two", problems, shards=2)
    assert [(t.problem_id, t.text, t.visits) for t in one] == [(t.problem_id, t.text, t.visits) for t in two]
