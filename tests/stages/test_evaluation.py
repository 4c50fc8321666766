"""An evaluation whose evaluator dies, or whose driver did: what is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evolve.evaluate import EvalJob, Evaluator, Record
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.progress import ProgressLine
from evolve.schema import ClusterConfig, EvaluateConfig, EvolveConfig, PolicyConfig, SearchConfig, VerifierConfig
from evolve.service import ServiceError
from evolve.stages import evaluation
from evolve.store.records import RecordFile
from evolve.types import Problem
from tests.doubles import DoublePolicy, DoublePPM

pytestmark = pytest.mark.usefixtures("ray_cluster")

PROBLEMS = [Problem(f"p{i:02}", f"question {i}", ("3",)) for i in range(40)]
POLICY = Checkpoint("model", "digest")


@pytest.fixture(scope="module")
def fleet(ray_cluster: None) -> Iterator[Fleet]:
    config = EvolveConfig(
        cluster=ClusterConfig(shards=1, verifier_cpus=0.5, restarts=9),
        verifier=VerifierConfig(supervisors=1),
        policy=PolicyConfig(format="printed"),
        search=SearchConfig(concurrent_trees=1),  # slowly, one problem after the other
        evaluate=EvaluateConfig(samples=2, search_problems=0),
    )
    made = Fleet(config, "cpu", Engines(DoublePolicy, DoublePPM))
    yield made
    made.stop()


@pytest.fixture
def dealt(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The problems of every share that an evaluator was given, in order."""
    found: list[list[str]] = []

    class Share(evaluation._Share):
        def __init__(self, evaluator: Any, problems: Sequence[Problem]) -> None:
            super().__init__(evaluator, problems)
            found.append([problem.id for problem in problems])

    monkeypatch.setattr(evaluation, "_Share", Share)
    monkeypatch.setattr(evaluation, "PROGRESS_S", 0.1)
    return found


def measure(fleet: Fleet, kept: RecordFile, tell: Callable[[], None] = lambda: None) -> list[Record]:
    return evaluation.measure(fleet.config, fleet, 0, POLICY, None, PROBLEMS, ProgressLine(), tell, kept)


def test_a_dead_evaluator_costs_only_what_it_had_not_handed_over(
    fleet: Fleet, tmp_path: Path, dealt: list[list[str]]
) -> None:
    import ray

    undisturbed = measure(fleet, RecordFile(tmp_path / "a", "x"))
    assert dealt == [[problem.id for problem in PROBLEMS]]
    dealt.clear()
    file, first_evaluator = tmp_path / "b", fleet.groups[0].evaluator
    known: list[set[str]] = []

    def disturb() -> None:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) > 5 and not known:
            known.append({line.partition('"problem_id": "')[2][:3] for line in lines[1:]})
            ray.kill(fleet.groups[0].evaluator)

    assert measure(fleet, RecordFile(file, "x"), disturb) == undisturbed
    first, again = dealt
    assert len(first) == len(PROBLEMS)
    assert again
    assert not known[0] & set(again)
    assert fleet.groups[0].evaluator is not first_evaluator


def test_what_an_earlier_driver_has_evaluated_is_taken_over(
    fleet: Fleet, tmp_path: Path, dealt: list[list[str]]
) -> None:
    earlier = RecordFile(tmp_path / "a", "x")
    earlier.open()
    earlier.append(asdict(Record(f"p{i:02}", None, greedy_correct=False, greedy_tokens=12345)) for i in range(30))
    records = measure(fleet, RecordFile(tmp_path / "a", "x"))
    assert [record.problem_id for record in records] == [problem.id for problem in PROBLEMS]
    assert [record.greedy_tokens == 12345 for record in records] == [True] * 30 + [False] * 10
    assert dealt == [[problem.id for problem in PROBLEMS[30:]]]


def test_when_all_is_evaluated_nobody_is_asked(fleet: Fleet, tmp_path: Path, dealt: list[list[str]]) -> None:
    kept = RecordFile(tmp_path / "a", "x")
    kept.open()
    kept.append(asdict(Record(problem.id, None, greedy_correct=True, greedy_tokens=1)) for problem in PROBLEMS)
    assert len(measure(fleet, RecordFile(tmp_path / "a", "x"))) == len(PROBLEMS)
    assert dealt == []


def test_an_engine_that_does_not_answer_is_an_error_that_says_so_and_what_is_kept(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        """Stands where the evaluator does."""

        async def evaluate(self, problems: Sequence[Problem], job: EvalJob) -> Any:
            evaluator = Evaluator("shard-0", None, None, None, 60.0)

            async def record(problem: Problem, job: EvalJob) -> Record:
                raise ServiceError("the engine of /checkpoint has not answered a request for 600 s")

            evaluator._record = record  # type: ignore[method-assign]
            return await evaluator.evaluate(problems, job)

        async def finished(self, start: int) -> list[Any]:
            return []

    import ray

    fleet.load(POLICY, None)
    monkeypatch.setattr(fleet.groups[0], "evaluator", ray.remote(Failing).options(num_cpus=0).remote())
    kept = RecordFile(tmp_path / "a", "x")
    kept.open()
    kept.append(asdict(Record(f"p{i:02}", None, greedy_correct=True, greedy_tokens=1)) for i in range(30))
    with pytest.raises(ServiceError) as stopped:
        measure(fleet, RecordFile(tmp_path / "a", "x"))
    assert str(stopped.value) == (
        "base model: evaluation cannot go on: the engine of /checkpoint has not answered a request for 600 s; "
        "30 of 40 problems are evaluated and kept"
    )
