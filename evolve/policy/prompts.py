"""Worked examples for a policy that was never trained on the step format (the bootstrap round)."""

from __future__ import annotations

from pathlib import Path

from evolve.policy.formats import CodeFormat, FewShot, PrintedFormat
from evolve.types import Step, StepFormat

SEPARATOR = "\n\n"
"""Between worked examples, and between the last of them and the question."""

_PENCILS = "A box holds 24 pencils. Mia buys 3 boxes and gives 15 pencils away. How many has she left?"
_TANK = (
    "A tank of 180 litres is two thirds full. Water runs out at 8 litres a minute. After how many minutes is it empty?"
)
_ROOTS = r"The equation $x^2 - 7x + 10 = 0$ has two roots. What is the sum of their squares?"

# Each problem: the question, the code of its steps, what the last step prints, the stated answer.
_WORKED: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        _PENCILS,
        (
            "# Step 1: Count the pencils in all boxes.\npencils = 24 * 3",
            "# Step 2: Take away the pencils that she gives away.\nleft = pencils - 15",
            "# Now print the final answer\nprint(left)",
        ),
        "57",
        r"Mia has \boxed{57} pencils left.",
    ),
    (
        _TANK,
        (
            "# Step 1: Find how much water is in the tank.\nfrom fractions import Fraction\n\n"
            "water = 180 * Fraction(2, 3)",
            "# Step 2: Divide by the amount that runs out each minute.\nminutes = water / 8",
            "# Now print the final answer\nprint(minutes)",
        ),
        "15",
        r"The tank is empty after \boxed{15} minutes.",
    ),
    (
        _ROOTS,
        (
            "# Step 1: Solve the equation exactly.\nfrom sympy import solve, symbols\n\n"
            'x = symbols("x")\nroots = solve(x**2 - 7*x + 10, x)',
            "# Step 2: Add the squares of the roots.\ntotal = sum(root**2 for root in roots)",
            "# Now print the final answer\nprint(total)",
        ),
        "29",
        r"The squares of the roots add up to \boxed{29}.",
    ),
)


def worked_examples(step_format: StepFormat) -> str:
    """The built-in worked examples in a format, each followed by `SEPARATOR`.

    Raises:
        ValueError: there are none for that format.
    """
    if isinstance(step_format, CodeFormat):
        solve = _in_code_format
    elif isinstance(step_format, PrintedFormat):
        solve = _in_printed_format
    else:
        raise ValueError(
            f"no built-in examples for {type(step_format).__name__}; "
            "write some to a text file and set policy.bootstrap.few_shot to its path"
        )
    return "".join(solve(*problem) + SEPARATOR for problem in _WORKED)


def few_shot(step_format: StepFormat, file: str | Path | None = None) -> FewShot:
    """A format with examples before its prompt: those of a text file, or the built-in ones.

    Raises:
        ValueError: no file is given and the format has no built-in examples, or the file is empty.
        OSError: the file cannot be read.
    """
    if file is None:
        return FewShot(step_format, worked_examples(step_format))
    text = Path(file).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"policy.bootstrap.few_shot={file}: the file is empty")
    return FewShot(step_format, text.rstrip("\n") + SEPARATOR)


def _in_code_format(question: str, steps: tuple[str, ...], printed: str, stated: str) -> str:
    code_format = CodeFormat()
    text = code_format.prompt(question)
    for number, code in enumerate(steps):
        final = number == len(steps) - 1
        text += code_format.render_step(code, final=final, first=number == 0)
        step = Step(text=text, code=code, final=final)
        text += code_format.inserted(step, printed)
    return text + code_format.render_answer(stated)


def _in_printed_format(question: str, steps: tuple[str, ...], printed: str, stated: str) -> str:
    printed_format = PrintedFormat()
    rendered = (printed_format.render_step(code, code is steps[-1]) for code in steps)
    return printed_format.prompt(question) + "".join(rendered)
