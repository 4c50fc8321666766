"""A shard and its board as Ray actors, with doubles for the engine and the verifier."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.schema import Generator, ValueKind
from evolve.search import shard
from evolve.search.board import Board, board_of, q_values, start_board
from evolve.search.budget import EscalatingBudget
from evolve.search.seeds import derive
from evolve.search.shard import SearchJob, Shard, summary_of
from evolve.search.uct import UCT
from evolve.service import ServiceError, ServiceHost
from evolve.store.trees import read_part, to_batch, write_part
from evolve.tree import Tree
from evolve.types import Candidate, NodeKind, Outcome, Problem, RoundPlan, Sampling, Status, Verdict

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


class Late(Policy):
    """Fails its first two requests as an engine does that answers them too late."""

    def __init__(self) -> None:
        self.asked = 0

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        self.asked += 1
        if self.asked <= 2:
            raise ServiceError("the engine of /checkpoint has not answered a request for 600 s")
        return await super().propose(prefixes, n, sampling)


class Verifier:
    """Runs everything; prints what the code says. The grading of a problem without an answer does not end."""

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        return Verdict(Status.OK, stdout=step.removeprefix("print(").removesuffix(")") if "print" in step else "")

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        if not problem.answers:
            return Outcome.TIMEOUT
        return Outcome.CORRECT if answer in problem.answers else Outcome.WRONG

    async def stats(self) -> Mapping[str, float]:
        return {"executions": 1.0}


def grow(
    directory: Path, problems: Sequence[Problem], shards: int = 1, policy: type[Policy] = Policy
) -> tuple[list[Tree], Any]:
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
        context=4096,
        concurrent_trees=8,
        concurrent_rollouts=1,
        tail_rollouts=1,
        trees=directory,
        policy=("/checkpoint", "policy"),
        ppm=None,
    )
    board = ray.remote(Board).options(num_cpus=0).remote(EscalatingBudget(plan), problems, (), directory)
    made = [
        actor(Shard, f"shard-{i}", actor(ServiceHost, policy), actor(ServiceHost, Verifier), None, 60.0)
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


def test_a_problem_whose_answers_cannot_be_graded_gets_its_tree_with_a_note_and_stops_nobody(tmp_path: Path) -> None:
    problems = [Problem("hangs", "question", ()), Problem("other", "question", ("3",))]
    (hangs, other), progress = grow(tmp_path, problems)
    assert (progress.done, progress.failure, progress.trees, progress.settled) == (True, "", 2, 2)
    assert progress.infrastructure_failures == hangs.infrastructure_failures == 0
    assert "grading ended with timeout" in hangs.note
    assert not list(hangs.terminals())
    assert other.rollouts == 6
    assert other.note == ""


def test_trees_whose_requests_were_not_answered_in_time_are_grown_again(tmp_path: Path) -> None:
    problems = [Problem(f"p{i:02}", f"question {i}", ("3",)) for i in range(6)]
    (quick, _), (late, progress) = grow(tmp_path / "a", problems), grow(tmp_path / "b", problems, policy=Late)
    assert progress.done
    assert not progress.failure
    assert [(t.problem_id, t.text, t.visits) for t in late] == [(t.problem_id, t.text, t.visits) for t in quick]


def test_q_values_of_a_problem_are_had_while_the_round_runs_and_after_its_tree_is_durable(tmp_path: Path) -> None:
    import ray

    tree = Tree("p0", 1, 0, 9, (5, 6))
    tree.add(0, NodeKind.TERMINAL, "# b", "print(3)", (8,), (-0.25,), answer="3", correct=True)
    UCT(rollouts=1).backup(tree, 1, 1.0)
    budget = EscalatingBudget(RoundPlan(1, Generator.previous, ValueKind.terminal, 6, 4, 2.0, 1, 0, ()))
    problems = [Problem("p0", "?", ("3",)), Problem("p1", "?", ("3",))]
    board = ray.remote(Board).options(num_cpus=0).remote(budget, problems, (), tmp_path)
    assert len(ray.get(board.take.remote("s", 8))) == 2
    reference = ray.put(to_batch(tree))
    ray.get(board.publish.remote("s", [(summary_of(tree), [reference])]))
    live = q_values(board, "p0")
    assert live.select(["node", "visits", "q", "correct"]).to_pylist() == [
        {"node": 0, "visits": 1, "q": 1.0, "correct": None},
        {"node": 1, "visits": 1, "q": 1.0, "correct": True},
    ]
    ray.get(board.durable.remote(write_part(tmp_path, "part-s", [to_batch(tree)])))
    assert ray.get(board.sources.remote("p0")).batches == ()
    assert q_values(board, "p0").equals(live)
    with pytest.raises(KeyError, match="p1"):
        q_values(board, "p1")
    ray.kill(board)


def test_the_board_of_a_run_is_found_by_its_name_while_it_searches(tmp_path: Path) -> None:
    import ray

    budget = EscalatingBudget(RoundPlan(1, Generator.previous, ValueKind.terminal, 6, 4, 2.0, 1, 0, ()))
    made = {run: start_board(run, budget, [Problem(run, "?", ("3",))], (), tmp_path) for run in ("night", "nights")}
    again = start_board("night", budget, [Problem("again", "?", ("3",))], (), tmp_path)
    assert ray.get(board_of("night").take.remote("s", 8))[0].problem.id == "again", "of two the newer"
    ray.kill(again)
    for board in made.values():
        ray.kill(board)

    def until_it_is_gone() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(ValueError):  # it is about to lose its name
                board_of("night")

    with pytest.raises(KeyError, match="no run named 'night' searches"):
        until_it_is_gone()


def test_a_durable_tree_leaves_the_object_store_while_others_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.worker import global_worker

    worker = global_worker.core_worker
    budget = EscalatingBudget(RoundPlan(1, Generator.previous, ValueKind.terminal, 6, 4, 2.0, 1, 0, ()))
    problems = [Problem("p0", "?", ("3",)), Problem("p1", "?", ("3",))]
    board = ray.remote(Board).options(num_cpus=0).remote(budget, problems, (), tmp_path)
    tree = Tree("p0", 1, 0, 9, (5, 6))
    tree.add(0, NodeKind.DEAD, "# " + "a" * 10**6, "", (8,), (-0.25,))

    async def publish(round_: Any) -> bytes:
        batch = to_batch(tree)
        reference = ray.put(batch)
        round_.finished.append((batch, reference))
        await board.take.remote("s", 8)
        await board.publish.remote("s", [(summary_of(tree), [reference])])
        return reference.binary()

    async def run() -> None:
        round_ = shard._Round("s", SimpleNamespace(trees=tmp_path), board, None)
        name = await publish(round_)
        assert worker.object_exists(ray.ObjectRef(name))
        assert name.hex().encode() in worker.get_all_reference_counts()
        writing = asyncio.create_task(round_._write_parts())
        round_.flush.set()
        async with asyncio.timeout(30):
            while name.hex().encode() in worker.get_all_reference_counts():  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.01)
            while worker.object_exists(ray.ObjectRef(name)):  # noqa: ASYNC110 (freed a moment later)
                await asyncio.sleep(0.01)
        assert not writing.done()
        round_.close()
        await asyncio.wait_for(writing, 30)

    monkeypatch.setattr(shard, "PART_SECONDS", 3600.0)
    asyncio.run(run())
    ray.kill(board)


def test_what_is_finished_while_the_last_part_is_written_is_made_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[Any] = []
    go_on, first = threading.Event(), True

    def write(directory: Path, stem: str, trees: Sequence[Any]) -> Any:
        nonlocal first
        if first:
            first = False
            assert go_on.wait(30)
        return trees

    async def durable(part: Any) -> None:
        announced.extend(part)

    async def run() -> None:
        board = SimpleNamespace(durable=SimpleNamespace(remote=durable))
        round_ = shard._Round("s", SimpleNamespace(trees=tmp_path), board, None)
        round_.finished.append(("one", None))
        round_.flush.set()
        writing = asyncio.create_task(round_._write_parts())
        while round_.finished:  # noqa: ASYNC110 (nothing tells that it was taken)
            await asyncio.sleep(0.001)
        round_.finished.append(("two", None))
        round_.close()
        go_on.set()
        await asyncio.wait_for(writing, 30)

    monkeypatch.setattr(shard, "write_part", write)
    asyncio.run(run())
    assert announced == ["one", "two"]
