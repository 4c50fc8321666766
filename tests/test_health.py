"""The health of an actor: every transition, without Ray and without waiting."""

from collections.abc import Callable

import pytest

from evolve.health import Act, Health, Limits, State

LIMITS = Limits(restarts=2, window_s=100.0, start_s=50.0, suspect_s=5.0, silence_s=20.0)


def engine(digest: str = "d1") -> Health:
    return Health("policy engine of shard-0", LIMITS, digest)


def healthy(digest: str = "d1") -> Health:
    made = engine(digest)
    made.answered(1.0, digest)
    return made


def test_an_engine_is_healthy_once_it_answers_with_the_expected_digest() -> None:
    made = engine()
    assert made.state is State.STARTING
    made.answered(1.0, None)
    assert made.state is State.CHECKING
    made.answered(2.0, "another")
    assert made.state is State.CHECKING
    made.answered(3.0, "d1")
    assert made.state is State.HEALTHY


def test_an_actor_that_serves_no_checkpoint_is_healthy_once_it_answers() -> None:
    made = engine("")
    made.answered(1.0, None)
    assert made.state is State.CHECKING, "its process is there, what it runs is not"
    made.answered(2.0, "")
    assert made.state is State.HEALTHY


def test_a_restarted_engine_is_not_healthy_before_its_digest_was_checked() -> None:
    made = healthy()
    assert made.died(2.0, "killed") is Act.WAIT
    assert made.state is State.RESTARTING
    made.answered(4.0, None)
    assert made.state is State.CHECKING
    made.answered(7.0, "d1")
    assert made.state is State.HEALTHY
    assert made.recovery_s == [5.0]


def test_an_engine_that_loads_another_checkpoint_is_checked_again() -> None:
    made = healthy()
    made.expects(2.0, "d1")
    assert made.state is State.HEALTHY
    made.expects(2.0, "d2")
    assert made.state is State.CHECKING
    made.answered(3.0, "d1")
    assert made.state is State.CHECKING
    made.answered(4.0, "d2")
    assert made.state is State.HEALTHY


def test_a_healthy_engine_that_answers_with_another_digest_is_checked_and_then_given_up() -> None:
    made = healthy()
    made.answered(2.0, "d0")
    assert made.state is State.CHECKING
    made.answered(40.0, "d0")
    assert made.tick(51.9) is Act.WAIT
    assert made.tick(52.1) is Act.KILL
    assert "did not serve the checkpoint" in made.deaths[0].reason


def test_silence_makes_suspect_an_answer_makes_healthy_again_and_long_silence_kills() -> None:
    made = healthy()
    assert made.tick(5.9) is Act.WAIT
    assert made.state is State.HEALTHY
    assert made.tick(6.1) is Act.WAIT
    assert made.state is State.SUSPECT
    made.answered(10.0, "d1")
    assert made.state is State.HEALTHY
    made.tick(20.0)
    assert made.tick(29.9) is Act.WAIT
    assert made.tick(30.1) is Act.KILL
    assert made.state is State.RESTARTING
    assert made.deaths[0].reason == "it did not answer for 20 s"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda made: None, "did not start within 50 s"),
        (lambda made: made.died(0.0, "killed") and None, "did not come back after its death within 50 s"),
    ],
)
def test_an_actor_that_does_not_come_up_in_time_is_killed(prepare: Callable[[Health], None], reason: str) -> None:
    made = engine()
    prepare(made)
    assert made.tick(49.0) is Act.WAIT
    assert made.tick(51.0) is Act.KILL
    assert reason in made.deaths[-1].reason


def test_one_death_that_is_seen_many_times_counts_once() -> None:
    made = healthy()
    for moment in (2.0, 2.5, 3.0):
        assert made.died(moment, "killed") is Act.WAIT
    assert len(made.deaths) == 1


def test_an_actor_that_was_replaced_may_die_again_at_once() -> None:
    made = healthy("")
    made.died(2.0, "killed")
    made.replaced(2.0)
    assert made.state is State.STARTING
    assert made.died(2.5, "killed again") is Act.WAIT
    assert [death.reason for death in made.deaths] == ["killed", "killed again"]


def test_more_deaths_than_allowed_within_the_window_stop_the_run() -> None:
    made = healthy()
    for moment in (10.0, 30.0):
        assert made.died(moment, "killed") is Act.WAIT
        made.answered(moment + 1, "d1")
    assert made.died(50.0, "killed") is Act.STOP
    assert made.state is State.FAILED
    made.answered(51.0, "d1")
    assert made.state is State.FAILED, "nothing brings it back"
    assert made.tick(52.0) is Act.STOP


def test_deaths_that_are_long_past_do_not_count() -> None:
    made = healthy()
    for moment in (10.0, 60.0, 115.0, 170.0, 225.0):
        assert made.died(moment, "killed") is Act.WAIT
        made.answered(moment + 1, "d1")
    assert made.died(230.0, "killed") is Act.STOP


def test_a_successor_that_cannot_be_started_is_a_death_of_its_own() -> None:
    made = healthy()
    made.died(2.0, "killed")
    assert made.failed(5.0, "no memory") is Act.KILL
    assert made.failed(8.0, "no memory") is Act.STOP
    assert [death.reason for death in made.deaths] == ["killed", "no memory", "no memory"]


def test_what_nobody_looked_at_is_no_silence_but_silence_before_and_after_it_adds_up() -> None:
    made = healthy()
    made.tick(16.0)
    made.unattended(4000.0, 3980.0)
    assert made.tick(4000.0) is Act.WAIT
    assert made.tick(4001.0) is Act.WAIT
    assert made.tick(4001.1) is Act.KILL


@pytest.mark.parametrize("begin", ["starting", "checking", "restarting"])
def test_a_start_does_not_take_too_long_because_nobody_looked(begin: str) -> None:
    made = engine()
    if begin == "checking":
        made.answered(0.0, None)
    if begin == "restarting":
        made.died(0.0, "killed")
    made.unattended(4000.0, 3990.0)
    assert made.tick(4000.0) is Act.WAIT
    assert made.tick(4041.0) is Act.KILL


def test_an_actor_made_while_nobody_looked_has_no_more_time_than_others() -> None:
    made = Health("board", LIMITS, since=3995.0)
    made.unattended(4000.0, 3990.0)
    assert made.tick(4049.0) is Act.WAIT
    assert made.tick(4051.0) is Act.KILL
