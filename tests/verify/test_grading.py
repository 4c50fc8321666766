"""Which answers are equal, which text states which answer, and what grading through the verifier gives."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.grading import sweep
from evolve.schema import VerifierConfig
from evolve.types import Outcome, Problem
from evolve.verify.grading import equiv, group
from evolve.verify.notation import extract_answer
from evolve.verify.numerals import LONGEST
from evolve.verify.service import GradingUnavailable, SandboxVerifier, packets
from evolve.verify.steps import CODE_BYTES

DATA = Path(__file__).parents[3] / "shared" / "data"

EQUAL = [
    ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}, 1 - \\sqrt{19}"),
    ("1 \\pm \\sqrt{19}", "[1 - sqrt(19), 1 + sqrt(19)]"),
    ("3\\sqrt{13}", "3*sqrt(13)"),
    ("6 - 5i", "6 - 5*I"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, pi/2)"),
    ("3, 5, 7", "[3, 5, 7]"),
    ("3, 5, 7", "7,5,3"),
    ("\\{1\\pm\\sqrt{5},-2\\}", "{-2, 1 - sqrt(5), 1 + sqrt(5)}"),
    ("(0,9) \\cup (9,36)", "(9,36) \\cup (0,9)"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("y = 2x + 3", "y = 3 + 2x"),
    ("x^5 - x^4 + 1", "x**5 - x**4 + 1"),
    ("\\text{(C)}", "C"),
    ("\\text{Evelyn}", "evelyn."),
    ("50\\%", "0.5"),
    ("50\\%", "50"),
    ("50%", "50 percent"),
    ("\\$18.90", "18.90 dollars"),
    ("1\\frac{4}{5}", "9/5"),
    ("90^\\circ", "90 degrees"),
    ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
    ("52_8", "52_{8}"),
    ("864 \\mbox{ inches}^2", "864 square inches"),
    ("10,\\!080", "10080"),
    ("58,500", "x = 58,500"),
    ("\\begin{pmatrix} 1/3 \\\\ 2 \\end{pmatrix}", "Matrix([[1/3], [2]])"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "[[1,2],[3,4]]"),
    ("\\frac{1}{3}", "0.3333333333333333"),
    (".0000672", "6.72e-05"),
    ("58", "57.99999999999999"),
    ("(-\\infty, 0]", "(-oo, 0]"),
    ("(2,\\infty)", "x > 2"),
    ("\\frac{\\sqrt{3}}{3}", "1/sqrt(3)"),
    ("288\\pi", "904.7786842338604"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("p - q", "-q+p"),
    ("5x - 7y + 4 = 0", "-5x+7y-4=0"),
    ("x=1,y=2", "y=2, x=1"),
    ("12 cm", "12 \\text{ cm}"),
    ("$\\frac{1}{2}$", "\\boxed{\\frac12}"),
    ("10,\\!080", "10 , \\! 080"),
    ("5 apples", "5"),
    ("12 inches", "12"),
    ("12 in", "12"),
    ("\\frac{1}{2}", "1/2 cup"),
    ("12 lbs", "12 pounds"),
    ("7 men", "7"),
    ("5 ml", "5"),
    ("5 km/h", "5"),
    ("5 km/h", "5 kilometers per hour"),
    ("60 mph", "60 \\text{ miles per hour}"),
    ("$5 per hour", "5 dollars/hour"),
    ("5 m/s", "5"),
    ("5 sq. ft", "5 square feet"),
    ("3\\pi cm", "3\\pi"),
    ("2x cm", "2x"),
    ("2 ab units", "2ab"),
    ("3 million", "3000000"),
    ("$3 million", "3,000,000 dollars"),
    ("1\\frac{1}{2} thousand", "1500"),
    ("2\\text{ dozen eggs}", "24"),
    ("5 hundred thousand", "500000"),
    ("2 cm, 3 cm", "2, 3"),
    ("2\\text{ cm}, 3\\text{ cm}", "2 cm, 3 cm"),
    ("(C)", "(C) 5"),
    ("C", "(C) 5"),
    ("\\text{(C)}", "(C) \\frac{1}{2}"),
    ("(C)", "(c)"),
    ("F", "(F)"),
    ("C", "Option C"),
    ("(C)", "choice c"),
    ("x<2 or x>3", "(-\\infty,2)\\cup(3,\\infty)"),
    ("x > 3\\text{ or }x \\le 2", "(-\\infty,2]\\cup(3,\\infty)"),
    ("(2 < x) | (x < -2)", "(-\\infty,-2)\\cup(2,\\infty)"),
    ("((-oo < x) & (x < 1/2)) | ((3 < x) & (x < oo))", "(-\\infty,\\frac12)\\cup(3,\\infty)"),
    ("(2 < x) & (x < 5)", "(2,5)"),
    ("(2 <= y) & (y < sqrt(5))", "2 \\leq y < \\sqrt{5}"),
    ("x > 2 and x < 5", "2 < x < 5"),
    ("5 \\geq x > 2", "(2,5]"),
    ("((1,2),(3,4))", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("Matrix([[1, 2], [3, 4]])", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("[[1 2]\n [3 4]]", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("[1 2 3]", "1, 2, 3"),
    ("[1 2 3]", "(1, 2, 3)"),
    ("[ 1.5 -2. ]", "[1.5, -2]"),
    ("Interval(2, 5)", "[2,5]"),
    ("Interval.open(2, 5)", "(2,5)"),
    ("Interval.Ropen(1, sqrt(2))", "[1,\\sqrt{2})"),
    ("Interval(-oo, 2)", "(-\\infty,2]"),
    ("Union(Interval.open(-oo, -2), Interval.open(2, oo))", "(-\\infty,-2)\\cup(2,\\infty)"),
    ("Union({4}, Interval(1, 2))", "[1,2]\\cup\\{4\\}"),
    ("FiniteSet(1, 2)", "\\{2,1\\}"),
    ("{1, 2}", "\\{1,2\\}"),
    ("EmptySet", "\\emptyset"),
    ("Reals", "(-\\infty,\\infty)"),
]
UNEQUAL = [
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    ("1,2", "1,3"),
    ("x=1,y=2", "x=2,y=1"),
    ("5 cm", "5 m"),
    ("50", "0.5"),
    ("A", "B"),
    ("\\text{(C)}", "(D)"),
    ("east", "west"),
    ("52_8", "52_7"),
    ("3", "3.01"),
    ("1.2e-7", "0"),
    ("\\sqrt{2}", "1.41"),
    ("x+1", "y+1"),
    ("6-5i", "6+5i"),
    ("", "0"),
    ("", ""),
    ("{1,2}", "{1,2,3}"),
    ("1000000.0", "1000001"),
    ("\\pi", "3.14"),
    ("12", "-12"),
    ("x^2", "x^3"),
    ("\\infty", "-\\infty"),
    ("__import__('os').getcwd()", "5"),
    ("2t", "2"),
    ("3s", "3"),
    ("2ab", "2"),
    ("x^2+3t", "x^2+3"),
    ("\\sqrt{2}h", "\\sqrt{2}"),
    ("2 ab", "2"),
    ("2 ab", "2 xy"),
    ("2 ab units", "2"),
    ("4 rs", "4 pq"),
    ("\\frac{1}{2} bh", "\\frac{1}{2}"),
    ("\\frac{1}{2} mg", "\\frac{1}{2}"),
    ("x^2 + 2 xy", "x^2 + 2"),
    ("3 million", "3"),
    ("3\\text{ million}", "3"),
    ("3 million", "3 billion"),
    ("5 dozen", "5"),
    ("3 quarters", "3"),
    ("10 squared", "10"),
    ("10\\text{ squared}", "10"),
    ("2 or three", "2"),
    ("7 PM", "7 AM"),
    ("$5", "5 cents"),
    ("$5", "€5"),
    ("5 km/h", "5 km"),
    ("5 km/h", "5 miles per hour"),
    ("5 gallons", "5 quarts"),
    ("2 cm, 3 cm", "2 m, 3 cm"),
    ("2*(x+1", "2"),
    ("3 \\foo", "3"),
    ("12 5", "17"),
    ("(C)", "(D) 5"),
    ("(C) 5", "(C) 6"),
    ("(C)", "(d)"),
    ("C", "c"),
    ("x", "(X)"),
    ("C", "Option D"),
    ("F", "(G)"),
    ("(A)", "(A) + B"),
    ("(A)", "(A) B"),
    ("(A)", "(A) \\cdot B"),
    ("(A)", "(A) and (B)"),
    ("(C)", "5"),
    ("x<2 and x>3", "(-\\infty,2)\\cup(3,\\infty)"),
    ("x<2, x>3", "(-\\infty,2)\\cup(3,\\infty)"),
    ("x<2 or y>3", "(-\\infty,2)\\cup(3,\\infty)"),
    ("x<2 or x>3", "(-\\infty,2]\\cup(3,\\infty)"),
    ("x<2 or x>3", "(2,3)"),
    ("(2 < x) & (x < 5)", "[2,5)"),
    ("(2 < x) & (x < 5)", "(2 < y) & (y < 5)"),
    ("(2 < x) & (y < 5)", "(2,5)"),
    ("(2 < x) | (x < 5)", "(2,5)"),
    ("2 < x > 5", "(2,5)"),
    ("x > 2", "y > 2"),
    ("x > 2", "x < 2"),
    ("x > 2", "x \\geq 2"),
    ("x > 2", "2"),
    ("x > 2", "x = 2"),
    ("x > 2", "x \\neq 2"),
    ("((1,3),(2,4))", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("((1,2),(3,4))", "\\begin{pmatrix}1&2\\\\3&4\\\\5&6\\end{pmatrix}"),
    ("((1,2),(3,4),(5,6))", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("[[1 3]\n [2 4]]", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("[1 2 3]", "[1 2 4]"),
    ("[1 2 3]", "(3, 2, 1)"),
    ("[1 2 3]", "[12 3]"),
    ("[1 2 3]", "6"),
    ("[1 -2]", "-1"),
    ("[1, 2]", "(1, 2)"),
    ("Interval(2, 5)", "(2,5)"),
    ("Interval.Lopen(2, 5)", "[2,5)"),
    ("Union(Interval(1, 2), Interval(3, 4))", "[1,2]"),
    ("FiniteSet(1, 2)", "(1,2)"),
    ("FiniteSet(1, 2)", "\\{1,3\\}"),
    ("EmptySet", "0"),
    ("EmptySet", "Reals"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_answers_are_equal_in_both_orders(a: str, b: str) -> None:
    assert equiv(a, b)
    assert equiv(b, a)


@pytest.mark.parametrize(("a", "b"), UNEQUAL)
def test_near_misses_are_unequal_in_both_orders(a: str, b: str) -> None:
    assert not equiv(a, b)
    assert not equiv(b, a)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{1} and then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{3} but \\boxed{4 is cut off", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("no answer", None),
        ("\\boxed{\\text{a } {b}}", "\\text{a } {b}"),
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
    started = time.monotonic()
    outcome = await verifier.grade(Problem("p", "q", ("x+1",)), "9^{9^{9^{9^9}}}")
    assert outcome is Outcome.TIMEOUT
    assert time.monotonic() - started < 8
    assert await verifier.grade(Problem("p", "q", ("\\sqrt{4}",)), "2") is Outcome.CORRECT


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
