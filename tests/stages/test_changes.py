"""Which finished artefacts a changed key would have changed."""

import pytest

from evolve.stages.changes import affected

FINISHED = {
    0: ("base", "evaluation"),
    1: ("search", "rows", "sft", "ppm", "evaluation"),
    2: ("search", "rows"),
}
ROUND_1 = ["round 1: search", "round 1: rows", "round 1: sft", "round 1: ppm", "round 1: evaluation"]
ROUND_2 = ["round 2: search", "round 2: rows"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("run.seed", ["round 0: base", "round 0: evaluation", *ROUND_1, *ROUND_2]),
        ("toy.layers", ["round 0: base", "round 0: evaluation", *ROUND_1, *ROUND_2]),
        ("search.rollouts", [*ROUND_1, *ROUND_2]),
        ("problems.limit", ["round 0: evaluation", *ROUND_1, *ROUND_2]),
        ("rounds.2.rollouts", ROUND_2),
        ("rounds.3.rollouts", []),
        ("sft.trajectories", [*ROUND_1[1:], *ROUND_2]),
        ("sft.epochs", [*ROUND_1[2:], *ROUND_2]),
        ("ppm.beta", [*ROUND_1[3:], *ROUND_2]),
        ("evaluate.samples", ["round 0: evaluation", "round 1: evaluation"]),
    ],
)
def test_a_key_changes_the_first_stage_that_reads_it_and_what_comes_after(key: str, expected: list[str]) -> None:
    assert affected(key, FINISHED) == expected


def test_nothing_finished_is_nothing_changed() -> None:
    assert affected("run.seed", {0: (), 1: ()}) == []


def test_every_key_that_can_change_results_has_a_stage() -> None:
    from evolve.config import _changes_results, _flatten
    from evolve.schema import EvolveConfig
    from evolve.stages.changes import _FIRST

    keys = [key for key, _ in _flatten(EvolveConfig()) if _changes_results(key) and not key.startswith("rounds")]
    assert [key for key in keys if not any(key.startswith(start) for start, _ in _FIRST)] == []
