"""Which text states which answer, how answers are grouped, and what grading through the verifier gives."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import permutations
from pathlib import Path

import math_verify
import math_verify.grader
import math_verify.parser
import pytest
import pytest_asyncio

from benchmarks.grading import sweep
from evolve.schema import VerifierConfig
from evolve.types import Outcome, Problem
from evolve.verify import formulas
from evolve.verify.fingerprints import Exhausted
from evolve.verify.grading import equiv, group
from evolve.verify.notation import extract_answer
from evolve.verify.numerals import LONGEST
from evolve.verify.service import GradingUnavailable, SandboxVerifier, packets
from evolve.verify.steps import CODE_BYTES

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{1} and then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{3} but \\boxed{4 is cut off", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("no answer", None),
        ("\\boxed{\\text{a } {b}}", "\\text{a } {b}"),
        ("\\boxed {5}", "5"),
        ("so \\boxed 5.", "5"),
        ("\\boxed 1,234 or \\boxed C", "C"),
        ("\\boxed{1 + \\fbox{2}}", "2"),
        ("\\boxed{a \\\\{b}}", "a \\\\{b}"),
        ("\\boxedx{5}", None),
        ("}} \\boxed{5}", "5"),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def golds() -> list[str]:
    """Gold answers: of MATH-500 and GSM8K where they are at hand, else some of their kinds."""
    found = []
    for name in ("math500.jsonl", "gsm8k.jsonl"):
        if (DATA / name).is_file():
            found += [str(json.loads(line)["answer"]) for line in (DATA / name).read_text().splitlines()]
    return found or [
        *("18", "-7", "0", "3.5", "70000", "\\frac{1}{2}", "-\\frac{14}{3}", "2\\sqrt{3}", "p - q", "x^2 + 3x - 10"),
        *("(3,5)", "(3,\\pi)", "[2,7)", "\\{1, 4\\}", "90^\\circ", "11\\pi", "2k + 2", "\\sqrt{51}", "12\\%"),
    ]


def test_every_gold_answer_equals_its_rewritings_and_no_near_miss() -> None:
    counts, wrong = sweep(golds())
    assert wrong == []
    assert min(counts["rewritings"], counts["near_misses"]) >= counts["golds"]
    assert counts["asymmetric"] == 0


def test_the_sweep_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.grading.equiv", lambda a, b: a == b or len(b) < len(a))
    counts, wrong = sweep(["12", "-7", "(3,5)"])
    assert min(counts["unequal_rewritings"], counts["equal_near_misses"], counts["asymmetric"]) > 0
    assert len(wrong) == counts["unequal_rewritings"] + counts["equal_near_misses"]


def test_boxes_are_found_in_linear_time() -> None:
    started = time.process_time()
    assert extract_answer("\\boxed{" * 100_000) is None
    assert extract_answer("\\boxed{" * 100_000 + "5" + "}" * 100_000) == "5"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "answers",
    [
        ["50%", "0.5", "50"],
        ["5 cm", "5", "5 m", "5 cm^2"],
        ["E", "e", "(E)", "2.718281828459045"],
        ["1/2", "0.5", "50\\%", "\\frac12 cm", "50 percent"],
    ],
)
def test_no_order_of_the_answers_changes_their_groups(answers: list[str]) -> None:
    found = set()
    for order in permutations(answers):
        groups = group(order)
        assert all(groups[first] == first <= index for index, first in enumerate(groups))
        found.add(frozenset(frozenset(a for a, g in zip(order, groups, strict=True) if g == i) for i in set(groups)))
    assert len(found) == 1


def test_no_vague_answer_joins_two_that_differ() -> None:
    assert group(["50%", "0.5", "50"]) == [0, 0, 2]
    assert group(["5", "5 m", "5 cm"]) == [0, 1, 0]


def test_different_equations_are_told_apart_quickly() -> None:
    group(["x+3y=7"])
    started = time.process_time()
    assert group([f"{k % 10 + 1}x+3y=7" for k in range(20)]) == [k % 10 for k in range(20)]
    assert group(["xy=1", "2x+6y=14", "y=\\frac1x", "x+3y=7", "x+3y=8"]) == [0, 1, 0, 1, 4]
    assert time.process_time() - started < 5


def test_grouping_names_the_first_of_each_group() -> None:
    assert group(["\\frac{1}{2}", "3", "0.5", "x", "3.0", "x"]) == [0, 1, 0, 3, 1, 3]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verifier() -> AsyncIterator[SandboxVerifier]:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1, grade_timeout_s=1.0))
    yield verifier
    await verifier.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_any_gold_alternative_will_do(verifier: SandboxVerifier) -> None:
    problem = Problem("p", "q", ("\\frac{1}{2}", "\\pi"))
    outcomes = await verifier.grade_many([(problem, answer) for answer in ("0.5", "pi", "\\frac24", "2", "")])
    assert outcomes == [Outcome.CORRECT, Outcome.CORRECT, Outcome.CORRECT, Outcome.WRONG, Outcome.WRONG]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_comparison_that_hangs_is_an_outcome_of_its_own(verifier: SandboxVerifier) -> None:
    assert await verifier.grade(Problem("p", "q", ("\\sqrt{4}",)), "2") is Outcome.CORRECT  # Its interpreter is up.
    started = time.monotonic()
    outcome = await verifier.grade(Problem("p", "q", ("x+1",)), "9^{9^{9^{9^9}}}")
    assert outcome is Outcome.TIMEOUT
    assert time.monotonic() - started < 8
    assert await verifier.grade(Problem("p", "q", ("\\sqrt{4}",)), "2") is Outcome.CORRECT


DEEP = "\\sqrt{" * 150 + "x" + "}" * 150


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_what_runs_out_of_memory_or_stack_is_not_unequal(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    formulas._math_verify.cache_clear()
    monkeypatch.setattr(math_verify.grader, "simplify", fail)
    monkeypatch.setattr(math_verify.grader, "solve", math_verify.grader.solve)
    monkeypatch.setattr(math_verify.parser, "latex2sympy", math_verify.parser.latex2sympy)
    try:
        for pair in (("\\sin^2 x+\\cos^2 x+y", "1+y"), (DEEP, "x")):
            with pytest.raises(Exhausted):
                equiv(*pair)
            with pytest.raises(Exhausted):
                equiv(*reversed(pair))
    finally:
        formulas._math_verify.cache_clear()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_comparison_that_runs_out_of_stack_is_neither_right_nor_wrong(verifier: SandboxVerifier) -> None:
    assert await verifier.grade(Problem("p", "q", ("x",)), DEEP) is Outcome.TIMEOUT
    assert await verifier.group(["2x", DEEP, "3x", "x*2"]) == [0, 1, 2, 0]


@pytest.mark.asyncio(loop_scope="module")
async def test_each_pair_has_a_time_limit_of_its_own(verifier: SandboxVerifier) -> None:
    answers = [f"y = \\sqrt{{x + {k % 6 + 2}}} + e^{{x + {k % 6}}}" for k in range(12)]
    answers[6:] = [answer.replace("= ", "= 0 + ") for answer in answers[6:]]
    assert await verifier.group(answers) == [k % 6 for k in range(12)]
    equations = [f"{k % 10 + 1}x+3y=7" for k in range(20)]
    assert await verifier._group_one_by_one(equations) == [k % 10 for k in range(20)]
    assert await verifier.group(equations) == [k % 10 for k in range(20)]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_sandbox_makes_the_same_groups_of_every_order(verifier: SandboxVerifier) -> None:
    answers = ["5 cm", "50%", "0.5", " 5", "50", "5 m", "\\frac12"]
    found = set()
    for order in (answers, answers[::-1], answers[3:] + answers[:3]):
        groups = await verifier.group(order)
        found.add(frozenset(frozenset(a for a, g in zip(order, groups, strict=True) if g == i) for i in set(groups)))
    assert len(found) == 1


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "answer", ["2*(x+1", "sqrt(3", "sqrt(3))", "1/0*sqrt(2)", "sqrt(2)**", "x\\foo{", "\ud800*\x00"]
)
async def test_what_is_no_formula_is_wrong(verifier: SandboxVerifier, answer: str) -> None:
    assert await verifier.grade(Problem("p", "q", ("x/2",)), answer) is Outcome.WRONG
    assert await verifier.grade(Problem("p", "q", (answer,)), answer) is Outcome.CORRECT


@pytest.mark.asyncio(loop_scope="module")
async def test_long_answers_are_graded_and_grouped_and_break_nothing(verifier: SandboxVerifier) -> None:
    before = (await verifier.stats()).get("sandbox_failures", 0)
    longer = [f"{i}" + "x" * 16_000 for i in range(20)]
    padded = [" " * 300_000 + text for text in ("1/2", "0.50", "\\frac{1}{2}", "\\frac 24")]
    assert await verifier.group([*longer, *padded, longer[3]]) == [*range(20), 20, 20, 20, 20, 3]
    assert await verifier.grade(Problem("p", "q", (longer[0], padded[2])), padded[3]) is Outcome.CORRECT
    many = [f"{i}" + "\x01" * (LONGEST - 100) for i in range(40)]
    assert await verifier.group([*many, "\\sqrt{4}", "2"]) == [*range(40), 40, 40]
    assert (await verifier.stats()).get("sandbox_failures", 0) == before


def test_packets_hold_everything_in_order_and_none_is_too_large() -> None:
    pairs = [[str(i), "\U0001d400\ud800\x00" * (i * 9 % LONGEST)] for i in range(100)]
    made = packets(pairs)
    assert [pair for packet in made for pair in packet] == pairs
    sizes = [len(json.dumps(packet, ensure_ascii=False).encode("utf-8", "surrogatepass")) for packet in made]
    assert max(sizes) <= CODE_BYTES
    assert len(sizes) > 2
    assert packets([]) == [[]]


@pytest.mark.asyncio
async def test_answers_that_the_sandbox_cannot_compare_are_neither_wrong_nor_distinct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(self: SandboxVerifier, problem_id: str, fields: dict[str, object]) -> dict[str, object]:
        return {"s": "infrastructure", "m": "no server starts", "cpu": 0.0, "wall": 0.0}

    monkeypatch.setattr(SandboxVerifier, "_request", refuse)
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    with pytest.raises(GradingUnavailable, match="no server starts"):
        await verifier.group(["x", "2x", "3x"])
    assert await verifier.group(["1", "1.0"]) == [0, 0]
    assert await verifier.grade(Problem("p", "q", ("x", "y")), "2x") is Outcome.INFRASTRUCTURE
    assert await verifier.grade(Problem("p", "q", ("x", "y")), "y") is Outcome.CORRECT


@pytest.mark.asyncio(loop_scope="module")
async def test_grading_is_deterministic_and_bounded_under_load(verifier: SandboxVerifier) -> None:
    problem = Problem("p", "q", ("2\\sqrt{3}",))
    answers = ["sqrt(12)", "\\sqrt{12}", "12", "2*sqrt(3)"] * 8
    first, second = await asyncio.gather(*(verifier.grade_many([(problem, a) for a in answers]) for _ in range(2)))
    assert first == second
    assert first[:4] == [Outcome.CORRECT, Outcome.CORRECT, Outcome.WRONG, Outcome.CORRECT]


@pytest.mark.asyncio(loop_scope="module")
async def test_sixty_four_answers_are_grouped_quickly(verifier: SandboxVerifier) -> None:
    answers = [f"\\sqrt{{{i % 40 + 2}}} + {i % 40}" for i in range(64)]
    await verifier.group(answers[:2])
    started = time.monotonic()
    assert await verifier.group(answers) == [i % 40 for i in range(64)]
    assert time.monotonic() - started < 5


@pytest.mark.asyncio(loop_scope="module")
async def test_one_answer_that_hangs_does_not_hold_up_the_other_sixty_three(verifier: SandboxVerifier) -> None:
    answers = [f"\\sqrt{{{i % 20 + 2}}} + {i % 20}" for i in range(64)]
    answers[5] = "9^{9^{9^{9^9}}}"
    started = time.monotonic()
    groups = await verifier.group(answers)
    assert groups == [i if i in (5, 25) else 25 if i % 20 == 5 else i % 20 for i in range(64)]
    # Its limit is 1 s: one comparison after another, with a limit each, would take a minute.
    assert time.monotonic() - started < 40
