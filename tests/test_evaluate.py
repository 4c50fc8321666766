"""Evaluation: choosing among samples, pass@k, intervals, the table."""

import math
from dataclasses import asdict

import pytest

from evolve.evaluate import Found, Record, Sample, best, interval, majority, pass_at, record_from, table


def record(samples: list[Sample], greedy: bool = False, **more: object) -> Record:
    return Record("p", 1, greedy, 10, samples, **more)  # type: ignore[arg-type]


def sample(correct: bool, group: int, logprob: float = -1.0, score: float | None = None) -> Sample:
    return Sample(correct, group, 5, logprob, score)


def test_the_majority_is_of_equal_answers_not_of_equal_texts() -> None:
    assert majority(record([sample(False, 0), sample(True, 1), sample(True, 1)]))
    assert not majority(record([sample(False, 0), sample(False, 0), sample(True, 2)]))


def test_samples_without_an_answer_have_no_vote() -> None:
    assert majority(record([sample(False, -1), sample(False, -1), sample(True, 2)]))
    assert not majority(record([sample(False, -1)]))


def test_the_first_of_equally_frequent_answers_wins() -> None:
    assert majority(record([sample(True, 0), sample(False, 1)]))
    assert not majority(record([sample(False, 0), sample(True, 1)]))


def test_best_of_n_takes_the_highest_value_among_those_with_an_answer() -> None:
    found = record([sample(False, -1, score=9.0), sample(True, 1, score=2.0), sample(False, 2, score=1.0)])
    assert best(found, lambda s: s.score)
    assert not best(record([sample(True, 0)]), lambda s: s.score)


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    found = record([sample(True, 0)] * 2 + [sample(False, 2)] * 3)
    assert pass_at(found, 1) == pytest.approx(2 / 5)
    assert pass_at(found, 2) == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))
    assert pass_at(found, 5) == 1.0


def test_an_interval_holds_its_value_and_is_repeatable() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = interval(values, 1000)
    assert found == interval(values, 1000)
    assert found.value == pytest.approx(0.3)
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(0.3 - 1.96 * math.sqrt(0.21 / 100), abs=0.02)


def test_the_table_counts_the_tokens_of_every_method_and_pairs_differences() -> None:
    right = record(
        [sample(True, 0, -1, 5.0), sample(False, 1, -2, 1.0)], True, scored_tokens=7, beam=Found(True, 20, 30)
    )
    wrong = record(
        [sample(False, 0, -1, 1.0), sample(True, 1, -2, 5.0)], False, scored_tokens=7, beam=Found(False, 20, 30)
    )
    rows = {row.method: row for row in table([right, wrong], 200)}
    assert rows["greedy"].accuracy.value == 0.5
    assert rows["greedy"].tokens == 20
    assert rows["majority@2"].tokens == 20
    assert rows["PPM best-of-2"].accuracy.value == 1.0
    assert rows["PPM best-of-2"].scored_tokens == 14
    assert rows["PPM best-of-2"].detail["minus_majority"] == 0.5
    assert rows["PPM beam"].tokens == 40
    assert rows["pass@2"].accuracy.value == 1.0


def test_a_record_survives_its_dictionary_form() -> None:
    found = record([sample(True, 0, -1, 5.0)], True, beam=Found(True, 1, 2))
    assert record_from(asdict(found)) == found
