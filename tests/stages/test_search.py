"""When a search stops for the sandbox's sake, and from what its board begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.config import load, resolve_round
from evolve.search.board import Progress
from evolve.service import ServiceError
from evolve.stages import search
from evolve.stages.growing import Growing
from evolve.stages.search import _board, _check_infrastructure
from evolve.store.parts import Parts
from evolve.store.run import RunDirectory, RunError
from evolve.store.trees import to_batch, write_part
from evolve.tree import Tree


def progress(failures: int, executions: int) -> Progress:
    counts: dict[str, Any] = dict.fromkeys(("problems", "settled", "solved", "trees", "rollouts", "sampled_tokens"), 9)
    return Progress(**counts, executions=executions, infrastructure_failures=failures, done=True)


@pytest.mark.parametrize(("failures", "executions"), [(0, 0), (20, 0), (30, 2970), (0, 10**6)])
def test_a_few_failures_of_the_sandbox_stop_no_run(failures: int, executions: int) -> None:
    _check_infrastructure(load([]), progress(failures, executions))


@pytest.mark.parametrize(("failures", "executions"), [(21, 0), (30, 2969)])
def test_a_run_whose_sandbox_fails_too_often_stops_and_says_what_to_do(failures: int, executions: int) -> None:
    with pytest.raises(ServiceError, match=r"max_infrastructure_failures=1\.0%.*--self-test.*remove their part files"):
        _check_infrastructure(load([]), progress(failures, executions))


def test_a_board_may_take_the_longer_to_start_the_more_parts_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "start_board", lambda run, *made: made)
    config, directory = load(["conf=rstar_math", "problems.per_round=null"]), RunDirectory(tmp_path)
    directory.round(2).trees.mkdir(parents=True)
    for number in range(300):
        (directory.round(2).trees / f"part-{number}.parquet").touch()
    run: Any = SimpleNamespace(config=config, directory=directory)
    parts = Parts({f"part-{number}.parquet": 1 for number in range(100)}, ())
    taken = {}
    for k in (1, 3):
        made, taken[k] = _board(run, resolve_round(config, k), (), directory.round(k), parts)
        assert made[2].parts == tuple(parts.trees)
    assert taken[1] == search.CLIENT_START_S + 100 * search.PART_START_S
    assert taken[3] == search.CLIENT_START_S + 400 * search.PART_START_S


def test_trees_of_problems_that_a_round_has_no_longer_are_refused_before_any_is_grown(tmp_path: Path) -> None:
    write_part(tmp_path, "part-a", [to_batch(Tree(problem, 2, 0, 9, (5, 6))) for problem in ("kept", "gone")])
    job: Any = SimpleNamespace(trees=tmp_path, plan=SimpleNamespace(round=2))
    fleet: Any = None
    with pytest.raises(RunError, match=r"1 problems that round 2 has no longer: gone\. .*another run\.name"):
        Growing(fleet, job, lambda _: pytest.fail("a board was made"), {"kept"})
