"""The tiny world: graded word problems that a model of under a million parameters can learn.

A problem tells how much one or two people have, what happens to it in 1 to 6 *events* (its
difficulty), and asks for an amount, a sum or a difference:

    Tom has 12 apples. Tom buys 5 more. How many apples has Tom?

Its solution has one step a sentence: a comment that quotes the sentence, and one line of Python.
The last step prints the answer. This is the exact text, in the step format `printed`
(`evolve.policy.formats` reads it; `prompt` and `solution` below write it):

    prompt    question + "\\n<code>\\n"
    step      "# " + sentence + "\\n" + code + "\\n<end_of_step>"
    last step "# " + sentence + "\\n" + code + "\\n<end_of_code>"

Nothing stands between a boundary and the next step. The three markers are single tokens.

*Splits.* The text of a question decides, by a hash, to which split it belongs; so splits never
share a text, whatever their seeds and sizes. A quarter of all event sequences (kinds of event and
of question) is reserved: `train` and `demo` never have them, every second problem of `dev` and
`test` does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evolve.toy.arithmetic import CodeError, run
from evolve.toy.forms import EVENTS, ITEMS, OPENING, PEOPLE, QUESTIONS, Form
from evolve.types import Problem

CODE = "<code>"
END_OF_STEP = "<end_of_step>"
END_OF_CODE = "<end_of_code>"

Split = Literal["train", "dev", "test", "demo"]
SPLITS: dict[Split, range] = {
    "train": range(6),
    "demo": range(6, 12),
    "dev": range(12, 14),
    "test": range(14, 16),
}
"""Sixteenths of the space of questions that each split owns."""

WILD_SHARE = 0.38
"""Probability that a sentence is said in a wild form."""
LARGEST_AMOUNT = 999
_ATTEMPTS = 10_000


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a problem, the code it means, and the code of the misconception about it."""

    kind: str
    text: str
    code: str
    wrong: str | None
    right: float
    """Share of demonstrations in which its code is right."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A problem with all that is known of it. The last sentence is the question."""

    sentences: tuple[Sentence, ...]
    answer: str

    @property
    def question(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def sequence(self) -> tuple[str, ...]:
        """Kinds of event in order, then the kind of question."""
        return tuple(sentence.kind for sentence in self.sentences[1:])


# --------------------------------------------------------------------------- text


def prompt(question: str) -> str:
    """Everything that precedes the first step."""
    return f"{question}\n{CODE}\n"


def step_text(sentence: str, code: str, final: bool) -> str:
    """One step of a solution."""
    return f"# {sentence}\n{code}\n{END_OF_CODE if final else END_OF_STEP}"


def solution(spec: Spec, codes: Sequence[str] | None = None) -> list[str]:
    """The steps of a solution with the given code lines, one a sentence; the right ones if None."""
    lines = [sentence.code for sentence in spec.sentences] if codes is None else list(codes)
    last = len(spec.sentences) - 1
    return [
        step_text(sentence.text, line, i == last)
        for i, (sentence, line) in enumerate(zip(spec.sentences, lines, strict=True))
    ]


def demonstrated(spec: Spec, rng: random.Random) -> list[str]:
    """The steps of a demonstration: each wild sentence has the right code only in its share of cases."""
    codes = [
        sentence.wrong if sentence.wrong is not None and rng.random() >= sentence.right else sentence.code
        for sentence in spec.sentences
    ]
    return solution(spec, codes)


def quoting(spec: Spec) -> tuple[str, str]:
    """Prompt and completion of the quoting task: a problem, then its sentences one a line."""
    return f"{spec.question}\n", "".join(f"# {sentence.text}\n" for sentence in spec.sentences)


# --------------------------------------------------------------------------- splits


def _hash(text: str, buckets: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def reserved(sequence: Sequence[str]) -> bool:
    """Whether only held-out problems may have this sequence of events."""
    return _hash("sequence " + " ".join(sequence), 4) == 0


def split_of(question: str) -> Split:
    """The only split in which a question may occur."""
    bucket = _hash(question, 16)
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def problems(
    count: int, seed: int, split: Split, difficulties: Sequence[int], operations: int, start: int = 0
) -> list[Problem]:
    """`count` different problems of a split, beginning with the `start`-th.

    `difficulties` are numbers of events: as many problems in a row as there are entries have one of
    each, in changing order. `operations` (4 to 12) says how many kinds of event there are, simplest
    first. The same arguments give the same problems; asking for more gives the same first ones.
    Raises `ValueError` for arguments out of range and `RuntimeError` when no further problem can be
    found.
    """
    drawn = specs(count, seed, split, difficulties, operations, start)
    return [
        Problem(
            id=f"toy-{split}-{seed}-{index}",
            question=spec.question,
            answers=(spec.answer,),
            difficulty=len(spec.sentences) - 2,
        )
        for index, spec in enumerate(drawn, start)
    ]


def specs(
    count: int, seed: int, split: Split, difficulties: Sequence[int], operations: int, start: int = 0
) -> list[Spec]:
    """As `problems`, with the meaning of every sentence."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if not difficulties or min(difficulties) < 1:
        raise ValueError(f"difficulties {list(difficulties)}: need numbers of events, each at least 1")
    if not 4 <= operations <= len(EVENTS):
        raise ValueError(f"operations {operations}: must be 4 to {len(EVENTS)}")
    found: list[Spec] = []
    seen: set[str] = set()
    for index in range(start + count):
        rng = random.Random(f"toy {split} {seed} {index}")
        events = _difficulty(difficulties, split, seed, index)
        novel = split in ("dev", "test") and index % 2 == 1
        spec = _find(rng, split, events, operations, novel, seen)
        seen.add(spec.question)
        found.append(spec)
    return found[start:]


def _difficulty(difficulties: Sequence[int], split: Split, seed: int, index: int) -> int:
    """Every run of `len(difficulties)` problems holds each of them once, so that rounds compare like with like."""
    block, place = divmod(index, len(difficulties))
    order = list(difficulties)
    random.Random(f"toy {split} {seed} block {block}").shuffle(order)
    return order[place]


def _find(rng: random.Random, split: Split, events: int, operations: int, novel: bool, seen: set[str]) -> Spec:
    for _ in range(_ATTEMPTS):
        kinds, asked = _sequence(rng, events, operations)
        if reserved((*kinds, asked)) is not novel:
            continue
        spec = _draw(rng, kinds, asked)
        if spec is not None and spec.question not in seen and split_of(spec.question) == split:
            return spec
    raise RuntimeError(
        f"no further {split} problem with {events} events and {operations} operations after "
        f"{_ATTEMPTS} attempts ({len(seen)} found): ask for fewer, or for more difficulties"
    )


# --------------------------------------------------------------------------- drawing


def _sequence(rng: random.Random, events: int, operations: int) -> tuple[list[str], str]:
    """Kinds of event and of question. A second person appears once, and is needed for giving."""
    kinds = list(EVENTS)[:operations]
    while True:
        drawn: list[str] = []
        for _ in range(events):
            two = "compare" in drawn
            drawn.append(rng.choice([k for k in kinds if k != ("compare" if two else "give")]))
        if drawn.count("distractor") * 2 <= events:
            break
    asked = rng.choice(list(QUESTIONS)) if "compare" in drawn else "amount"
    return drawn, asked


def _draw(rng: random.Random, kinds: Sequence[str], asked: str) -> Spec | None:
    """A problem with the given events, or None when the numbers drawn do not work out."""
    people = rng.sample(PEOPLE, 2)
    item = rng.choice(ITEMS)
    state: dict[str, int] = {}
    sentences: list[Sentence] = []
    for kind in ("opening", *kinds):
        forms = OPENING if kind == "opening" else EVENTS[kind]
        form = _form(rng, forms)
        p, q = people
        if len(state) == 2 and rng.random() < 0.5:
            p, q = q, p
        for _ in range(8):
            after = dict(state)
            sentence = _say(rng, kind, form, p, q, item, state)
            if sentence is not None and _works(sentence.code, after):
                break
        else:
            return None
        state = after
        sentences.append(sentence)
    p, q = people
    if asked == "difference" and state[p.lower()] < state[q.lower()]:
        p, q = q, p
    if asked == "amount" and len(state) == 2 and rng.random() < 0.5:
        p, q = q, p
    question = _say(rng, asked, _form(rng, QUESTIONS[asked]), p, q, item, state)
    if question is None:
        return None
    printed = run(question.code, state)
    return Spec((*sentences, question), str(printed).strip())


def _form(rng: random.Random, forms: Sequence[Form]) -> Form:
    wild = [form for form in forms if form.wild]
    return rng.choice(wild if wild and rng.random() < WILD_SHARE else [f for f in forms if not f.wild])


def _works(code: str, state: dict[str, int]) -> bool:
    """Run `code` on `state`; whether all divisions come out even and all amounts stay in range."""
    try:
        run(code, state, exact=True)
    except CodeError:
        return False
    return all(0 < amount <= LARGEST_AMOUNT for amount in state.values())


def _say(
    rng: random.Random, kind: str, form: Form, p: str, q: str, item: str, state: dict[str, int]
) -> Sentence | None:
    """Fill in a form with drawn numbers; None when `{k}` would not be positive."""
    n = rng.choice((10, 20, 25, 50)) if kind == "percent" else rng.randint(*form.n)
    m = rng.randint(*form.m)
    scope = {"n": n, "m": m, "x": rng.randint(2, 20), "p": state.get(p.lower(), 0)}
    run(f"k = {form.k}", scope)
    if scope["k"] < 0:
        return None
    numbers = {"n": n, "m": m, "k": scope["k"]}
    variables = {"p": p.lower(), "q": q.lower()}
    return Sentence(
        kind=kind,
        text=form.text.format(p=p, q=q, i=item, **numbers),
        code=form.code.format(**variables, **numbers),
        wrong=None if form.wrong is None else form.wrong.format(**variables, **numbers),
        right=form.right,
    )
