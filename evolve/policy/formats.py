"""Step formats: the text conventions between policy, search and verifier.

A format says what precedes the first step, how one sampled continuation is read, and what the
environment inserts after a step has run. Formats are pure functions of text: they decide by
grammar, never by looking for words in a program's output. A further format (plain sentences,
sub-questions, reflections) is a further class, registered in `FORMATS`.

**Text is kept as sampled.** A candidate's text is the decoding of its token ids, so the last token
may carry white space past the boundary: tokenizers of large models have one token for `>` and the
line break after it. `parse` therefore allows white space after a boundary, and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from evolve.types import Answer, Invalid, Parsed, Step, StepFormat

CODE = "<code>"
END_OF_STEP = "<end_of_step>"
END_OF_CODE = "<end_of_code>"
OUTPUT = "<output>"
END_OF_OUTPUT = "<end_of_output>"
ANSWER = "<answer>"
END_OF_ANSWER = "<end_of_answer>"
MARKERS = (CODE, END_OF_STEP, END_OF_CODE, OUTPUT, END_OF_OUTPUT, ANSWER, END_OF_ANSWER)

_BOXED = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}` of a text, braces balanced; None without one.

    An escaped brace (`\{`) does not count towards the balance.
    """
    start = text.rfind(_BOXED)
    while start >= 0:
        depth, position = 1, start + len(_BOXED)
        while position < len(text):
            character = text[position]
            if character == "\\":
                position += 2
                continue
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start + len(_BOXED) : position]
            position += 1
        start = text.rfind(_BOXED, 0, start)
    return None


def _split_boundary(text: str, boundaries: tuple[str, ...]) -> tuple[str, str] | Invalid:
    """Cut `text` into (body, boundary) at its first boundary."""
    found = [(text.find(boundary), boundary) for boundary in boundaries if boundary in text]
    if not found:
        return Invalid(text, f"no boundary: expected one of {', '.join(boundaries)} at the end")
    position, boundary = min(found)
    if text[position + len(boundary) :].strip():
        return Invalid(text, f"text after the boundary {boundary}")
    return text[:position], boundary


def _parse_code(text: str, body: str, boundary: str) -> Parsed:
    """A step from its body, once any opening marker is gone."""
    stray = next((marker for marker in MARKERS if marker in body), None)
    if stray is not None:
        return Invalid(text, f"marker {stray} inside a step")
    code = body.strip("\n").rstrip()
    if not code.strip():
        return Invalid(text, "empty step")
    return Step(text=text, code=code, final=boundary == END_OF_CODE)


@dataclass(frozen=True, slots=True)
class CodeFormat:
    r"""The format of rStar-Math (arXiv 2501.04519): code, its output, and a boxed answer in words.

    A whole solution, `␤` marking each line break::

        <|user|>:␤
        {question}␤
        <|assistant|>: Let's think step by step and solve the problem with code.␤
        <code>␤
        # Step 1: Calculate the total distance.␤
        total = 16 * 2␤
        <end_of_step>␤
        # Now print the final answer␤
        print(total)␤
        <end_of_code>␤
        <output>32<end_of_output>␤
        <answer>The distance is \boxed{32}.<end_of_answer>

    The prompt ends after `code.`, without a line break: the policy samples `␤<code>␤` itself, and
    the line break before each later step. Only the line from `<output>` to the line break after
    `<end_of_output>` is inserted; its line break before `<output>` is left out when the sampled
    step ends with one already.
    """

    stop: tuple[str, ...] = (END_OF_STEP, END_OF_CODE, END_OF_ANSWER)

    def prompt(self, question: str) -> str:
        """Everything that precedes the first step; no line break at its end."""
        return f"<|user|>:\n{question}\n<|assistant|>: Let's think step by step and solve the problem with code."

    def parse(self, text: str, code_ended: bool) -> Parsed:
        """Read one sampled continuation; never raises.

        Before the code has ended a continuation is a step, with an optional `<code>` before it;
        after that it is `<answer>…<end_of_answer>` with a boxed answer.
        """
        if code_ended:
            return self._parse_answer(text)
        split = _split_boundary(text, (END_OF_STEP, END_OF_CODE))
        if isinstance(split, Invalid):
            return split
        body, boundary = split
        opened = body.lstrip()
        if opened.startswith(CODE):
            body = opened.removeprefix(CODE)
        return _parse_code(text, body, boundary)

    def inserted(self, step: Step, stdout: str) -> str:
        """The output line after the last step of the code; nothing after other steps."""
        if not step.final:
            return ""
        line_break = "" if step.text.endswith("\n") else "\n"
        return f"{line_break}{OUTPUT}{stdout.strip()}{END_OF_OUTPUT}\n"

    def result(self, step: Step, stdout: str) -> str | None:
        """None: the answer is what the policy states after it has seen the output."""
        return None

    def render_step(self, code: str, final: bool, first: bool = False) -> str:
        """A step as the policy would sample it; `parse` gives `code` back."""
        opening = f"\n{CODE}\n" if first else "\n"
        return f"{opening}{code}\n{END_OF_CODE if final else END_OF_STEP}"

    def render_answer(self, sentence: str) -> str:
        r"""A final answer as the policy would sample it; `sentence` holds a `\boxed{…}`."""
        return f"{ANSWER}{sentence}{END_OF_ANSWER}"

    @staticmethod
    def _parse_answer(text: str) -> Parsed:
        split = _split_boundary(text, (END_OF_ANSWER,))
        if isinstance(split, Invalid):
            return split
        body = split[0].strip()
        if not body.startswith(ANSWER):
            return Invalid(text, f"an answer begins with {ANSWER}")
        sentence = body.removeprefix(ANSWER)
        stray = next((marker for marker in MARKERS if marker in sentence), None)
        if stray is not None:
            return Invalid(text, f"marker {stray} inside an answer")
        answer = last_boxed(sentence)
        if answer is None or not answer.strip():
            return Invalid(text, "no boxed answer")
        return Answer(text=text, answer=answer.strip())


@dataclass(frozen=True, slots=True)
class PrintedFormat:
    """The tiny world's format: comment and code, and what the last step prints is the answer.

    A whole solution, `␤` marking each line break and nothing following a boundary::

        {question}␤
        <code>␤
        # Ann has 3 pears.␤
        a = 3␤
        <end_of_step># Print the answer.␤
        print(a)␤
        <end_of_code>
    """

    stop: tuple[str, ...] = (END_OF_STEP, END_OF_CODE)

    def prompt(self, question: str) -> str:
        """The question and the marker that opens the code, each with its line break."""
        return f"{question}\n{CODE}\n"

    def parse(self, text: str, code_ended: bool) -> Parsed:
        """Read one sampled continuation as a step; never raises."""
        if code_ended:
            return Invalid(text, "the code has ended: nothing follows its last step")
        split = _split_boundary(text, self.stop)
        if isinstance(split, Invalid):
            return split
        return _parse_code(text, *split)

    def inserted(self, step: Step, stdout: str) -> str:
        """Nothing: the policy does not see the output."""
        return ""

    def result(self, step: Step, stdout: str) -> str | None:
        """What the last step printed (empty when it printed nothing); None for other steps."""
        return stdout.strip() if step.final else None

    def render_step(self, code: str, final: bool) -> str:
        """A step as the policy would sample it; `parse` gives `code` back."""
        return f"{code}\n{END_OF_CODE if final else END_OF_STEP}"


@dataclass(frozen=True, slots=True)
class FewShot:
    """A format whose prompt starts with worked examples, for a policy never trained on the format.

    Everything else is the inner format's. Training rows must be built with the inner format's
    prompt, for the trained policy sees no examples.
    """

    inner: StepFormat
    examples: str
    """Put before the prompt as it is; end it with the separation wanted."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The inner format's boundary strings."""
        return self.inner.stop

    def prompt(self, question: str) -> str:
        """The examples, then the inner format's prompt."""
        return self.examples + self.inner.prompt(question)

    def parse(self, text: str, code_ended: bool) -> Parsed:
        """As the inner format."""
        return self.inner.parse(text, code_ended)

    def inserted(self, step: Step, stdout: str) -> str:
        """As the inner format."""
        return self.inner.inserted(step, stdout)

    def result(self, step: Step, stdout: str) -> str | None:
        """As the inner format."""
        return self.inner.result(step, stdout)


FORMATS: dict[str, Callable[[], StepFormat]] = {"code": CodeFormat, "printed": PrintedFormat}
"""Formats by the name that `policy.format` gives them."""


def format_named(name: str) -> StepFormat:
    """The step format of a name in `FORMATS`.

    Raises:
        ValueError: no format has that name; the message names the nearest one.
    """
    if name in FORMATS:
        return FORMATS[name]()
    near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)
    raise ValueError(
        f"policy.format={name!r}: no such step format; did you mean {near[0]!r}? "
        f"Known formats: {', '.join(sorted(FORMATS))}."
    )
