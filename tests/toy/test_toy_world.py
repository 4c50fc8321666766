"""The tiny world: its problems, splits, demonstrations and oracle."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from evolve.toy.arithmetic import CodeError, run
from evolve.toy.forms import EVENTS, OPENING, QUESTIONS
from evolve.toy.oracle import oracle_step_ok, read
from evolve.toy.world import (
    END_OF_CODE,
    END_OF_STEP,
    SPLITS,
    Spec,
    demonstrated,
    problems,
    prompt,
    quoting,
    reserved,
    solution,
    specs,
    split_of,
    step_text,
)

ALL = [1, 2, 3, 4, 5, 6]


def test_problems_are_the_same_each_time_and_a_longer_request_extends_a_shorter() -> None:
    few = problems(20, 3, "train", ALL, 12)
    assert problems(50, 3, "train", ALL, 12)[:20] == few
    assert problems(10, 3, "train", ALL, 12, start=10) == few[10:]
    assert few[7].id == "toy-train-3-7"
    assert problems(20, 4, "train", ALL, 12) != few


def test_splits_share_no_text_across_seeds_and_sizes() -> None:
    texts = {split: {p.question for seed in (0, 1) for p in problems(150, seed, split, [1, 2], 4)} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not texts[first] & texts[second]
    assert all(split_of(text) == split for split, found in texts.items() for text in found)


def test_problems_of_a_split_differ_from_one_another() -> None:
    questions = [p.question for p in problems(400, 0, "train", [1], 4)]
    assert len(set(questions)) == len(questions)


def test_half_of_the_held_out_problems_have_sequences_that_training_never_has() -> None:
    seen = {s.sequence for split in ("train", "demo") for s in specs(400, 0, split, [1, 2], 5)}
    assert not any(map(reserved, seen))
    for split in ("dev", "test"):
        held_out = specs(60, 0, split, [1, 2], 5)
        assert [reserved(s.sequence) for s in held_out] == [False, True] * 30
        assert not {s.sequence for s in held_out[1::2]} & seen


def test_as_many_problems_in_a_row_as_there_are_difficulties_have_one_of_each() -> None:
    found = [problem.difficulty or 0 for problem in problems(18, 3, "train", [1, 1, 2, 3, 3, 4], 12)]
    runs = [found[start : start + 6] for start in (0, 6, 12)]
    assert [sorted(run) for run in runs] == [[1, 1, 2, 3, 3, 4]] * 3
    assert len({tuple(run) for run in runs}) > 1, "the order changes"


@pytest.mark.parametrize("operations", range(4, 13))
def test_every_number_of_operations_has_held_out_problems_of_every_difficulty(operations: int) -> None:
    for difficulty in ALL:
        for problem in problems(4, 0, "dev", [difficulty], operations):
            assert problem.difficulty == difficulty
    kinds = {kind for s in specs(60, 0, "dev", ALL, operations) for kind in s.sequence[:-1]}
    assert kinds <= set(list(EVENTS)[:operations])


def test_answers_are_what_real_python_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for spec in specs(150, 5, "train", ALL, 12):
        code = "".join(solution(spec)).replace(END_OF_STEP, "").replace(END_OF_CODE, "")
        exec(compile(code, "solution", "exec"), {})
        assert capsys.readouterr().out.strip() == spec.answer


def test_the_text_of_a_solution_is_the_documented_one() -> None:
    spec = read("Tom has 12 apples. Tom loses 5. How many apples has Tom?")
    assert spec.answer == "7"
    assert prompt(spec.question).endswith("has Tom?\n<code>\n")
    assert "".join(solution(spec)) == (
        "# Tom has 12 apples.\ntom = 12\n<end_of_step>"
        "# Tom loses 5.\ntom -= 5\n<end_of_step>"
        "# How many apples has Tom?\nprint(tom)\n<end_of_code>"
    )
    assert quoting(spec) == (
        spec.question + "\n",
        "# Tom has 12 apples.\n# Tom loses 5.\n# How many apples has Tom?\n",
    )


def test_a_problem_read_back_from_its_text_means_the_same() -> None:
    for split in SPLITS:
        for spec in specs(150, 11, split, ALL, 12):
            assert read(spec.question) == spec


def test_reading_a_foreign_text_names_the_sentence() -> None:
    with pytest.raises(ValueError, match="Tom sings"):
        read("Tom has 12 apples. Tom sings. How many apples has Tom?")


def test_seed_forms_are_always_demonstrated_rightly_and_wild_ones_in_their_share() -> None:
    rng = random.Random(0)
    right: dict[float, list[bool]] = {}
    for spec in specs(1500, 0, "demo", ALL, 12):
        for sentence, step, truth in zip(spec.sentences, demonstrated(spec, rng), solution(spec), strict=True):
            right.setdefault(sentence.right, []).append(step == truth)
    assert set(right) == {1.0, 0.45, 0.30, 0.20, 0.10}
    for share, outcomes in right.items():
        assert sum(outcomes) / len(outcomes) == pytest.approx(share, abs=0.06 if share < 1 else 0)


def test_every_misconception_changes_the_code() -> None:
    forms = [form for group in (*EVENTS.values(), *QUESTIONS.values(), OPENING) for form in group]
    assert len(EVENTS) == 12
    assert all(form.wrong != form.code for form in forms)
    assert all(form.wild == (form.right < 1) for form in forms)


@pytest.fixture
def borrowing() -> Spec:
    return read("Ann has 20 nuts. Ann borrows 5. Ann sells 4 today. How many nuts has Ann?")


def test_the_oracle_accepts_every_step_of_a_right_solution() -> None:
    for problem in problems(50, 2, "dev", ALL, 12):
        steps = solution(read(problem.question))
        assert all(oracle_step_ok(problem, steps[:k]) for k in range(1, len(steps) + 1))


def test_the_oracle_rejects_a_misconception_and_what_follows_it(borrowing: Spec) -> None:
    steps = solution(borrowing)
    steps[1] = step_text("Ann borrows 5.", "ann -= 5", final=False)
    assert [oracle_step_ok(borrowing, steps[:k]) for k in range(1, 5)] == [True, False, False, False]


def test_the_oracle_accepts_other_code_with_the_same_effect(borrowing: Spec) -> None:
    steps = [solution(borrowing)[0], step_text("Ann borrows 5.", "ann = ann + 5", final=False)]
    assert oracle_step_ok(borrowing, steps)


@pytest.mark.parametrize(
    "step",
    [
        "# Ann has 20 nuts.\nann = 20\n<end_of_code>",
        "# Ann has 20 nuts.\nann = 20\n",
        "# Ann has 20 nuts.\nann = 2O\n<end_of_step>",
        "# Ann has 20 nuts.\nann = nuts\n<end_of_step>",
        "# Ann has 20 nuts.\nann = 20 // 0\n<end_of_step>",
    ],
    ids=["ends early", "no boundary", "not Python", "unknown name", "division by zero"],
)
def test_the_oracle_rejects_broken_steps(borrowing: Spec, step: str) -> None:
    assert not oracle_step_ok(borrowing, [step])


@pytest.mark.parametrize("code", ["import os", "x = 2 ** 9", "print(open('f'))", "x = 'a'", "x = y = 1 if 1 else 2"])
def test_the_evaluator_refuses_what_is_outside_its_grammar(code: str) -> None:
    with pytest.raises(CodeError):
        run(code, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "nowhere"}, "choose one of"),
        ({"difficulties": []}, "difficulties"),
        ({"difficulties": [0]}, "difficulties"),
        ({"operations": 3}, "operations"),
        ({"operations": 13}, "operations"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(arguments: dict, message: str) -> None:
    request = {"count": 1, "seed": 0, "split": "train", "difficulties": [1], "operations": 4}
    with pytest.raises(ValueError, match=message):
        problems(**{**request, **arguments})
