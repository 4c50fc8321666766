"""The step formats: exact texts, what is refused, and parsing that never raises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.policy.formats import MARKERS, CodeFormat, FewShot, PrintedFormat, format_named, last_boxed
from evolve.types import Answer, Invalid, Step

CODE = CodeFormat()
PRINTED = PrintedFormat()
FORMATS = [CODE, PRINTED]

pieces = st.sampled_from([*MARKERS, "\n", " ", "#", "x = 1", "\\boxed{", "}", "error", "é", "\x00", "\\"])
marked_text = st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=12).map("".join)
code_text = (
    st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)
    .map(lambda text: text.strip("\n").rstrip())
    .filter(lambda text: text.strip() and not any(marker in text for marker in MARKERS))
)


def test_whole_solution_in_the_papers_format_is_read_step_by_step() -> None:
    assert CODE.prompt("What is 16 times 2?") == (
        "<|user|>:\nWhat is 16 times 2?\n<|assistant|>: Let's think step by step and solve the problem with code."
    )
    first = CODE.parse("\n<code>\n# Step 1: Multiply.\ntotal = 16 * 2\n<end_of_step>", False)
    assert isinstance(first, Step)
    assert (first.code, first.final) == ("# Step 1: Multiply.\ntotal = 16 * 2", False)
    assert CODE.inserted(first, "noise") == ""
    last = CODE.parse("\n# Now print the final answer\nprint(total)\n<end_of_code>", False)
    assert isinstance(last, Step)
    assert (last.code, last.final) == ("# Now print the final answer\nprint(total)", True)
    assert CODE.inserted(last, "32\n") == "\n<output>32<end_of_output>\n"
    assert CODE.result(last, "32\n") is None
    answer = CODE.parse(r"<answer>The distance is \boxed{32}.<end_of_answer>", True)
    assert isinstance(answer, Answer)
    assert answer.answer == "32"


def test_output_is_inserted_on_its_own_line_even_when_the_last_token_held_the_line_break() -> None:
    step = CODE.parse("print(1)\n<end_of_code>\n", False)
    assert isinstance(step, Step)
    assert step.text + CODE.inserted(step, "1\n") == "print(1)\n<end_of_code>\n<output>1<end_of_output>\n"


def test_whole_solution_in_the_tiny_worlds_format() -> None:
    assert PRINTED.prompt("How many?") == "How many?\n<code>\n"
    step = PRINTED.parse("# Ann has 3 pears.\na = 3\n<end_of_step>", False)
    assert step == Step("# Ann has 3 pears.\na = 3\n<end_of_step>", "# Ann has 3 pears.\na = 3", False)
    last = PRINTED.parse("# Print.\nprint(a)\n<end_of_code>", False)
    assert isinstance(last, Step)
    assert last.final
    assert (PRINTED.result(last, "3\n"), PRINTED.inserted(last, "3\n")) == ("3", "")
    assert PRINTED.result(step, "3\n") is None


def test_a_last_step_that_prints_nothing_gives_an_empty_answer() -> None:
    last = PRINTED.parse("a = 3\n<end_of_code>", False)
    assert isinstance(last, Step)
    assert PRINTED.result(last, "") == ""


def test_printing_the_word_error_is_no_error() -> None:
    text = 'e = 0.1\nprint("relative error", e)  # Traceback\n<end_of_step>'
    for step_format in FORMATS:
        assert isinstance(step_format.parse(text, False), Step)


@pytest.mark.parametrize(
    ("text", "code_ended", "reason"),
    [
        ("a = 1\n", False, "no boundary"),
        ("", False, "no boundary"),
        ("\n <end_of_step>", False, "empty step"),
        ("a = 1\n<end_of_step>b = 2", False, "text after"),
        ("<output>3<end_of_output>\n<end_of_step>", False, "marker <output>"),
        ("a = 1\n<code>\nb = 2\n<end_of_step>", False, "marker <code>"),
        ("<answer>\\boxed{1}<end_of_answer>", False, "no boundary"),
        ("x = 1\n<end_of_step>", True, "no boundary"),
        ("The answer is \\boxed{1}<end_of_answer>", True, "begins with <answer>"),
        ("<answer>It is 1.<end_of_answer>", True, "no boxed"),
        ("<answer>\\boxed{ }<end_of_answer>", True, "no boxed"),
        ("<answer>\\boxed{1<end_of_answer>", True, "no boxed"),
        ("<answer>\\boxed{1}", True, "no boundary"),
    ],
)
def test_what_is_no_step_is_invalid_with_its_reason(text: str, code_ended: bool, reason: str) -> None:
    parsed = CODE.parse(text, code_ended)
    assert isinstance(parsed, Invalid)
    assert reason in parsed.reason


def test_nothing_follows_the_code_in_the_tiny_worlds_format() -> None:
    assert isinstance(PRINTED.parse("a = 1\n<end_of_step>", True), Invalid)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{8", "7"),
        ("plain", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize("step_format", FORMATS, ids=["code", "printed"])
@given(text=marked_text, code_ended=st.booleans())
def test_parse_never_raises_and_keeps_the_text(step_format: CodeFormat, text: str, code_ended: bool) -> None:
    parsed = step_format.parse(text, code_ended)
    assert parsed.text == text


@pytest.mark.parametrize("step_format", FORMATS, ids=["code", "printed"])
@given(code=code_text, final=st.booleans())
def test_rendered_steps_are_parsed_back(step_format: CodeFormat, code: str, final: bool) -> None:
    text = step_format.render_step(code, final)
    assert step_format.parse(text, False) == Step(text, code, final)
    assert step_format.parse(text + "\n", False) == Step(text + "\n", code, final)


@given(code=code_text)
def test_a_rendered_first_step_is_parsed_back(code: str) -> None:
    text = CODE.render_step(code, final=False, first=True)
    assert CODE.parse(text, False) == Step(text, code, False)


@given(answer=code_text.filter(lambda text: not set("{}\\") & set(text)))
def test_rendered_answers_are_parsed_back(answer: str) -> None:
    text = CODE.render_answer(f"So it is \\boxed{{{answer}}}.")
    assert CODE.parse(text, True) == Answer(text, answer.strip())


def test_formats_are_found_by_name_and_the_nearest_is_named() -> None:
    assert format_named("code") == CODE
    assert format_named("printed") == PRINTED
    with pytest.raises(ValueError, match="did you mean 'printed'"):
        format_named("print")


def test_few_shot_changes_the_prompt_alone() -> None:
    wrapped = FewShot(CODE, "EXAMPLES\n\n")
    assert wrapped.prompt("Q") == "EXAMPLES\n\n" + CODE.prompt("Q")
    assert wrapped.stop == CODE.stop
    text = "a = 1\n<end_of_code>"
    step = wrapped.parse(text, False)
    assert step == CODE.parse(text, False)
    assert isinstance(step, Step)
    assert wrapped.inserted(step, "1") == CODE.inserted(step, "1")
    assert wrapped.result(step, "1") is None
