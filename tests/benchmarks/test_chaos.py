"""The plan of kills: seeded, spread over the stages, and only where a target works."""

from benchmarks.chaos import STAGES, TARGETS, _due, plan_kills

DURATIONS = dict.fromkeys(STAGES, 10.0)


def test_kills_are_in_the_order_of_the_stages_and_only_where_their_target_works() -> None:
    kills = plan_kills(60, 3, list(TARGETS), DURATIONS)
    assert len(kills) == 60
    places = [(STAGES.index((kill.stage, kill.round)), kill.delay_s) for kill in kills]
    assert places == sorted(places)
    assert all(kill.stage in TARGETS[kill.target] and 0 <= kill.delay_s <= 9 for kill in kills)
    assert {kill.target for kill in kills} == set(TARGETS)
    assert all(kill.round > 0 for kill in kills if kill.target == "ppm")


def test_the_same_seed_plans_the_same_kills_and_another_seed_others() -> None:
    first, again, other = (plan_kills(20, seed, list(TARGETS), DURATIONS) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_kill_is_due_in_its_stage_after_its_delay_and_in_every_later_stage() -> None:
    [kill] = plan_kills(1, 0, ["shard"], DURATIONS)
    place = STAGES.index((kill.stage, kill.round))
    assert not _due(kill, STAGES[place], kill.delay_s - 0.01)
    assert _due(kill, STAGES[place], kill.delay_s)
    assert not _due(kill, STAGES[place - 1], 1000.0)
    assert _due(kill, STAGES[place + 1], 0.0)
