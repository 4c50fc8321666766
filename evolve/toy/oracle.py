"""What only a tiny world can have: the truth about single steps.

A step is right exactly when finishing the rest correctly still reaches the answer. This tells, in
tests and experiments, label noise of the search apart from weakness of a model that learns from
the labels. Nothing in the loop itself uses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from evolve.toy.arithmetic import CodeError, run
from evolve.toy.forms import EVENTS, ITEMS, OPENING, PEOPLE, QUESTIONS, Form
from evolve.toy.world import END_OF_CODE, END_OF_STEP, Sentence, Spec
from evolve.types import Problem

_FIELDS = {
    "p": f"(?P<p>{'|'.join(PEOPLE)})",
    "q": f"(?P<q>{'|'.join(PEOPLE)})",
    "i": f"(?:{'|'.join(ITEMS)})",
    "n": r"(?P<n>\d+)",
    "m": r"(?P<m>\d+)",
    "k": r"(?P<k>\d+)",
}
_BEGINNING: dict[str, tuple[Form, ...]] = {"opening": OPENING}


def read(question: str) -> Spec:
    """Recover a problem's meaning, hence its answer, from its text alone.

    Raises `ValueError` naming the first sentence that is not the tiny world's.
    """
    texts = re.split(r"(?<=[.?]) ", question)
    state: dict[str, int] = {}
    people: list[str] = []
    sentences: list[Sentence] = []
    printed: str | None = None
    for index, text in enumerate(texts):
        last = index == len(texts) - 1
        kinds = QUESTIONS if last else EVENTS if index else _BEGINNING
        sentence = _read_sentence(text, kinds, people)
        if sentence is None:
            raise ValueError(f"not a sentence of the tiny world here: {text!r}")
        printed = run(sentence.code, state)
        people = [name.capitalize() for name in state]
        sentences.append(sentence)
    return Spec(tuple(sentences), str(printed).strip())


def oracle_step_ok(problem: Problem | Spec, steps: Sequence[str]) -> bool:
    """Whether the last of `steps` still lets the right rest of the solution reach the answer.

    `steps` are texts in the `printed` format, from the first on; the k-th is taken to deal with
    the k-th sentence. A step whose code fails, or that ends the code too early or too late, is
    wrong.
    """
    spec = read(problem.question) if isinstance(problem, Problem) else problem
    if not 0 < len(steps) <= len(spec.sentences):
        return False
    final = len(steps) == len(spec.sentences)
    if not steps[-1].endswith(END_OF_CODE if final else END_OF_STEP):
        return False
    state: dict[str, int] = {}
    printed: str | None = None
    rest = [sentence.code for sentence in spec.sentences[len(steps) :]]
    try:
        for step in steps:
            printed = run(step.removesuffix(END_OF_CODE).removesuffix(END_OF_STEP), state)
        for code in rest:
            printed = run(code, state)
    except CodeError:
        return False
    return printed is not None and printed.strip() == spec.answer


def _read_sentence(text: str, kinds: dict[str, tuple[Form, ...]], people: Sequence[str]) -> Sentence | None:
    for kind, forms in kinds.items():
        for form in forms:
            match = _pattern(form.text).fullmatch(text)
            if match is None:
                continue
            found = match.groupdict()
            if not _fits(kind, found, people):
                continue
            p, q = _persons(found, people)
            fields = {**found, "p": p.lower(), "q": q.lower()}
            wrong = None if form.wrong is None else form.wrong.format(**fields)
            return Sentence(kind, text, form.code.format(**fields), wrong, form.right)
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", template)
    seen: set[str] = set()
    pattern = ""
    for position, part in enumerate(parts):
        if position % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={part})" if part in seen else _FIELDS[part]
            seen.add(part)
    return re.compile(pattern)


def _fits(kind: str, found: dict[str, str], people: Sequence[str]) -> bool:
    """Whether the persons named are known already, or are the new ones that this kind introduces.

    "A has 5 more apples than B" means one thing when A is new and another when B is.
    """
    p, q = found.get("p"), found.get("q")
    if kind == "opening":
        return not people
    if kind == "compare":
        return p in people and q not in people and len(people) == 1
    return all(person in people for person in (p, q) if person is not None)


def _persons(found: dict[str, str], people: Sequence[str]) -> tuple[str, str]:
    """The persons that a sentence is about; those it does not name are taken in order of mention."""
    p = found.get("p") or people[0]
    q = found.get("q") or next((person for person in people if person != p), p)
    return p, q
