"""When a search stops for the sandbox's sake."""

from typing import Any

import pytest

from evolve.config import load
from evolve.search.board import Progress
from evolve.service import ServiceError
from evolve.stages.search import _check_infrastructure


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
