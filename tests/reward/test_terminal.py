"""What a graded answer is worth."""

import pytest

from evolve.reward.terminal import terminal_value
from evolve.types import Outcome


@pytest.mark.parametrize(("outcome", "value"), [(Outcome.CORRECT, 1.0), (Outcome.WRONG, -1.0)])
def test_graded_answers_are_worth_plus_or_minus_one(outcome: Outcome, value: float) -> None:
    assert terminal_value(outcome) == value


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.INFRASTRUCTURE])
def test_an_answer_that_was_not_graded_is_no_label(outcome: Outcome) -> None:
    assert terminal_value(outcome) is None
