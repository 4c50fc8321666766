"""The plan of kills: seeded, spread over the stages, and only where a target works; and what two runs must share."""

import pytest

from benchmarks.chaos.__main__ import GOALS
from benchmarks.chaos.outcome import differences
from benchmarks.chaos.plan import STAGES, TARGETS, Kill, plan_kills, works


def test_kills_are_in_the_order_of_the_stages_and_only_where_their_target_works() -> None:
    kills = plan_kills(60, 3, list(TARGETS))
    assert len(kills) == 60
    places = [(kill.place, kill.share) for kill in kills]
    assert places == sorted(places)
    assert all(works(kill.target, STAGES[kill.place]) and 0 <= kill.share <= 0.9 for kill in kills)
    assert {kill.target for kill in kills} == set(TARGETS)


def test_every_other_kill_is_the_drivers_and_goes_through_all_stages() -> None:
    kills = plan_kills(25, 1, list(TARGETS))
    driven = [STAGES[kill.place] for kill in kills if kill.target == "driver"]
    assert len(driven) == 13
    assert set(driven) == set(STAGES)
    assert {kill.target for kill in kills} == set(TARGETS)


@pytest.mark.parametrize("targets", [["driver"], ["shard", "board"]])
def test_targets_that_are_asked_for_alone_take_turns(targets: list[str]) -> None:
    kills = plan_kills(8, 1, targets)
    assert {target: sum(kill.target == target for kill in kills) for target in targets} == dict.fromkeys(
        targets, 8 // len(targets)
    )


def test_the_same_seed_plans_the_same_kills_and_another_seed_others() -> None:
    first, again, other = (plan_kills(20, seed, list(TARGETS)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_kill_is_due_in_its_stage_after_its_share_of_the_stage_and_in_every_later_stage() -> None:
    [kill] = plan_kills(1, 0, ["shard"])
    place = kill.place
    assert not kill.due(STAGES[place], kill.share - 0.001)
    assert kill.due(STAGES[place], kill.share)
    assert not kill.due(STAGES[place - 1], 1000.0)
    assert kill.due(STAGES[place + 1], 0.0)


def test_a_kill_that_came_too_late_is_moved_to_the_next_stage_of_its_target() -> None:
    kill = Kill("trainer", "sft", 1, 0.5)
    assert kill.postpone(("ppm", 1))
    assert (kill.stage, kill.round) == ("sft", 2)
    assert not kill.postpone(("ppm", 2))


OUTCOME = {
    "base": "b", "trees 1": {"p/0": "x", "p/1": "y"}, "trees twice 1": 0,
    "sft rows 1": "r", "sft checkpoint 1": "c", "evaluation 1": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "exact", "served"),
    [
        ({}, [], []),
        ({"trees 1": {"p/0": "x"}}, ["trees 1"], []),
        ({"trees 1": {"p/1": "y"}}, ["trees 1"], ["trees 1"]),
        ({"trees twice 1": 1}, ["trees twice 1"], []),
        ({"sft checkpoint 1": "d"}, ["sft checkpoint 1"], []),
        ({"sft checkpoint 1": ""}, ["sft checkpoint 1"], ["sft checkpoint 1"]),
        ({"base": "a"}, ["base"], ["base"]),
        ({"evaluation 1": None}, ["evaluation 1"], ["evaluation 1"]),
    ],
)
def test_everything_must_be_equal_but_what_depends_on_samples(
    change: dict, exact: list[str], served: list[str]
) -> None:
    assert differences(OUTCOME, OUTCOME | change, exact=True) == exact
    assert differences(OUTCOME, OUTCOME | change, exact=False) == served


def test_a_kill_that_found_nothing_to_kill_misses_the_goals() -> None:
    record = {"trees_twice": 0, "faults": 0, "processes_left": 0, "kills_without_target": 0}
    assert all(goal.met(record) for goal in GOALS)
    assert not all(goal.met(record | {"kills_without_target": 1}) for goal in GOALS)
