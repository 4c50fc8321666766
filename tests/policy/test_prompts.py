"""Worked examples are real solutions: their code runs, prints what is shown, and parses."""

import re
from pathlib import Path

import pytest

from evolve.policy.formats import CodeFormat, FewShot, PrintedFormat, last_boxed
from evolve.policy.prompts import SEPARATOR, few_shot, worked_examples
from evolve.types import Answer, Step


def test_examples_of_the_papers_format_run_and_state_what_they_print(capsys: pytest.CaptureFixture[str]) -> None:
    code_format = CodeFormat()
    examples = worked_examples(code_format).removesuffix(SEPARATOR).split(SEPARATOR + "<|user|>")
    assert len(examples) == 3
    for example in examples:
        solution = example[example.index("\n<code>") :]
        code, rest = solution.split("<end_of_code>")
        steps = [*re.split(r"(?<=<end_of_step>)", code)[:-1], code.split("<end_of_step>")[-1] + "<end_of_code>"]
        parsed = [code_format.parse(step, False) for step in steps]
        assert all(isinstance(step, Step) for step in parsed)
        exec("\n".join(step.code for step in parsed if isinstance(step, Step)), {})
        printed = capsys.readouterr().out
        output, answer = rest.split("<answer>")
        assert output == code_format.inserted(Step("", "", True), printed)
        stated = code_format.parse("<answer>" + answer, True)
        assert isinstance(stated, Answer)
        assert stated.answer == printed.strip() == last_boxed(answer)


def test_examples_of_the_tiny_worlds_format_parse_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    printed_format = PrintedFormat()
    text = worked_examples(printed_format)
    for example, expected in zip(text.split("<code>\n")[1:], ("57", "15", "29"), strict=True):
        code, _ = example.split("<end_of_code>")
        pieces = code.split("<end_of_step>")
        steps = [piece + "<end_of_step>" for piece in pieces[:-1]] + [pieces[-1] + "<end_of_code>"]
        parsed = [printed_format.parse(step, False) for step in steps]
        exec("\n".join(step.code for step in parsed if isinstance(step, Step)), {})
        assert capsys.readouterr().out.strip() == expected


def test_examples_come_from_a_file_when_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "examples.txt"
    file.write_text("WORKED\n")
    assert few_shot(CodeFormat(), file).prompt("Q") == "WORKED\n\n" + CodeFormat().prompt("Q")
    file.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        few_shot(CodeFormat(), file)


def test_a_format_without_built_in_examples_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"policy\.bootstrap\.few_shot"):
        few_shot(FewShot(CodeFormat(), ""))
