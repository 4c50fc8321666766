"""A search whose actors die: it ends by itself with the trees of an undisturbed one, none twice and none missing."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.schema import ClusterConfig, EvolveConfig, Generator, ValueKind, VerifierConfig
from evolve.search.board import Board
from evolve.search.budget import EscalatingBudget
from evolve.search.grown import Summaries
from evolve.search.shard import SearchJob
from evolve.stages.growing import Growing
from evolve.store.parts import Parts, mended_parts
from evolve.store.trees import read_part
from evolve.types import Problem, RoundPlan, Sampling
from tests.doubles import DoublePolicy, DoublePPM

pytestmark = pytest.mark.usefixtures("ray_cluster")

PROBLEMS = [Problem(f"p{i:02}", f"question {i}", ("3",)) for i in range(24)]
STOP = ("<end_of_step>", "<end_of_code>")
PLAN = RoundPlan(1, Generator.previous, ValueKind.terminal, 6, 4, 2.0, 1, 0, ())


@pytest.fixture(scope="module")
def fleet(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    cluster = ClusterConfig(shards=2, verifier_cpus=0.5, restarts=9)
    config = EvolveConfig(cluster=cluster, verifier=VerifierConfig(supervisors=1))
    made = Fleet(config, "cpu", Engines(DoublePolicy, DoublePPM))
    made.load(Checkpoint(str(tmp_path_factory.mktemp("model")), "digest"), None)
    yield made
    made.stop()


def grow(fleet: Fleet, trees: Path, disturb: Callable[[Growing], None] | None = None) -> list[Any]:
    """All trees in the part files, after disturbing the search once a few are finished."""
    import ray

    trees.mkdir(parents=True)
    policy = ("model", "digest")
    job = SearchJob(
        plan=PLAN, run_seed=5, format="printed", few_shot="", sampling=Sampling(stop=STOP),
        max_depth=6, context=4096, concurrent_trees=4, concurrent_rollouts=1, tail_rollouts=1, trees=trees,
        policy=policy, ppm=None,
    )  # fmt: skip

    def board(parts: Parts) -> tuple[Any, float]:
        finished = Summaries(trees, tuple(parts.trees))
        made: Any = ray.remote(Board).options(num_cpus=0)
        return made.remote(EscalatingBudget(PLAN), PROBLEMS, finished, trees), 300.0

    growing = Growing(fleet, job, board, {problem.id for problem in PROBLEMS})
    deadline = time.monotonic() + 300
    try:
        while not growing.poll():
            assert time.monotonic() < deadline, (growing.latest, fleet.watch.unhealthy())
            if disturb is not None and growing.latest is not None and growing.latest.trees >= 6:
                disturb(growing)
                disturb = None
            time.sleep(0.02)
    finally:
        growing.close()
    assert disturb is None, "it was over before it was disturbed"
    assert growing.latest is not None
    parts = mended_parts(trees)
    assert parts.count == growing.latest.trees == len(PROBLEMS)
    found = [tree for name in parts.trees for tree in read_part(trees / name)]
    return sorted([(t.problem_id, t.text, t.visits, t.value_sum) for t in found])


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return grow(fleet, tmp_path_factory.mktemp("undisturbed") / "trees")


def kill_engine(growing: Growing) -> None:
    os.kill(growing._fleet.watch.pids()["policy engine of shard-0"], signal.SIGKILL)


def kill_verifier(growing: Growing) -> None:
    os.kill(growing._fleet.watch.pids()["verifier of shard-1"], signal.SIGKILL)


def kill_shard(growing: Growing) -> None:
    import ray

    ray.kill(growing._fleet.groups[0].shard)


def kill_board(growing: Growing) -> None:
    import ray

    ray.kill(growing._board)


@pytest.mark.parametrize("disturb", [kill_engine, kill_verifier, kill_shard, kill_board])
def test_a_search_ends_with_the_same_trees_whoever_dies(
    fleet: Fleet, undisturbed: list[Any], tmp_path: Path, disturb: Callable[[Growing], None]
) -> None:
    assert grow(fleet, tmp_path / "trees", disturb) == undisturbed


def test_a_shard_that_cannot_be_reached_is_ended_before_its_trees_are_grown_by_others(
    fleet: Fleet, undisturbed: list[Any], tmp_path: Path
) -> None:
    import ray
    from ray.exceptions import RayActorError

    unreachable = []

    def lose_contact(growing: Growing) -> None:
        """The call of `grow` ends as one of a dead actor does; the shard lives."""
        ref, (name, shard) = next(iter(growing._growing.items()))
        del growing._growing[ref]
        dead = ray.remote(SimpleNamespace).options(num_cpus=0).remote()
        ray.kill(dead)
        growing._growing[dead.__ray_ready__.remote()] = (name, shard)
        unreachable.append(shard)

    assert grow(fleet, tmp_path / "trees", lose_contact) == undisturbed
    with pytest.raises(RayActorError):
        ray.get(unreachable[0].__ray_ready__.remote(), timeout=60)


def test_a_search_that_is_ended_keeps_its_finished_trees(fleet: Fleet, undisturbed: list[Any], tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def end(growing: Growing) -> None:
        raise Ended

    with pytest.raises(Ended):
        grow(fleet, tmp_path / "trees", end)
    kept = mended_parts(tmp_path / "trees").count
    assert 6 <= kept < len(PROBLEMS)
