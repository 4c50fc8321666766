"""Reading, checking and splitting problem sets.

Everything that is wrong with a data set is reported at once, by line or row, before anything starts.
What is legal but worth knowing (duplicate questions, blank lines, training problems dropped because
they are held out) is in `ProblemSet.notes`.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evolve.schema import EvolveConfig, FieldsConfig
from evolve.sources import Row, rows_of
from evolve.types import Problem

MAX_ANSWER_CHARACTERS = 400
"""A longer gold answer is a solution, not an answer, and cannot be compared with one."""
SHOWN = 20
"""Errors printed of one data set; the rest is counted."""


class ProblemsError(ValueError):
    """Everything that is wrong with a problem set."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(errors)
        shown = [f"  {error}" for error in self.errors[:SHOWN]]
        if len(self.errors) > SHOWN:
            shown.append(f"  ... and {len(self.errors) - SHOWN} more")
        head = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
        super().__init__(f"{head} in the problem set:\n" + "\n".join(shown))


@dataclass(frozen=True)
class ProblemSet:
    """Training problems in the order the rounds take them, and held-out ones; no problem is in both."""

    train: tuple[Problem, ...]
    test: tuple[Problem, ...]
    per_round: int | None = None
    """Fresh problems a round takes; None: every round takes all."""
    notes: tuple[str, ...] = ()
    """What is legal but worth knowing, to be shown and kept with the run."""

    def digest(self) -> str:
        """SHA-256 of all problems in order: the same on two starts, or the data has changed."""
        digest = hashlib.sha256()
        for problem in (*self.train, *self.test):
            digest.update(repr((problem.id, problem.question, problem.answers)).encode())
        return digest.hexdigest()


def load_problems(config: EvolveConfig) -> ProblemSet:
    """Read, check and split the problems of a configuration.

    The held-out split depends on `run.seed` and the problems' ids alone, not on their order.

    Raises:
        ProblemsError: naming every row that cannot be used, or a split or round left empty.
    """
    problems, seed = config.problems, config.run.seed
    notes: list[str] = []
    if problems.path == "toy":
        train, test = _toy(config)
    else:
        train = _checked(rows_of(problems.path, problems), problems.fields, notes)
        if problems.test_path is None:
            train, test = _hold_out(train, problems.test_size, seed)
    if problems.test_path is not None:
        test = _checked(rows_of(problems.test_path, problems), problems.fields, notes)
        train = _without_held_out(train, test, notes)
    if problems.limit is not None:
        train = train[: problems.limit]
    if problems.per_round is not None and problems.path != "toy":
        # Files are often sorted by topic or difficulty; fresh slices of them would not be alike.
        train.sort(key=lambda p: _order(seed, "train", p.id))
    found = ProblemSet(tuple(train), tuple(test), problems.per_round, tuple(notes))
    _assert_disjoint(found)
    for k in range(1, len(config.rounds) + 1) if config.round is None else (config.round,):
        count = len(for_round(found, k))
        if problems.per_round is not None and count < problems.per_round:
            notes.append(f"round {k} has {count} fresh problems, not {problems.per_round}: there are no more")
    return replace(found, notes=tuple(notes))


def for_round(problems: ProblemSet, k: int) -> tuple[Problem, ...]:
    """The training problems of round `k` (from 1): its fresh slice, or all of them.

    Raises:
        ProblemsError: the earlier rounds have used up all problems.
    """
    if problems.per_round is None:
        chosen = problems.train
    else:
        chosen = problems.train[(k - 1) * problems.per_round : k * problems.per_round]
    if not chosen:
        raise ProblemsError(
            [
                f"round {k} has no problems left: there are {len(problems.train)} and every round takes "
                f"{problems.per_round}; lower problems.per_round, raise problems.limit, or set "
                "problems.per_round=null to use all in every round"
            ]
        )
    return chosen


def normalised(question: str) -> str:
    """A question's text up to case, white space and Unicode form; equal texts are one problem."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", question)).strip().casefold()


def _toy(config: EvolveConfig) -> tuple[list[Problem], list[Problem]]:
    from evolve.toy import world

    problems, toy = config.problems, config.toy
    if problems.per_round is None:
        raise ProblemsError(["problems.per_round is null; the tiny world needs a number, e.g. 450"])

    def draw(count: int, split: Literal["train", "test"]) -> list[Problem]:
        return list(
            world.problems(
                count=count,
                seed=config.run.seed,
                split=split,
                difficulties=toy.difficulties,
                operations=toy.operations,
                start=0,
            )
        )

    count = problems.per_round * len(config.rounds)
    if problems.limit is not None:
        count = min(count, problems.limit)
    return draw(count, "train"), draw(problems.test_size, "test")


# --------------------------------------------------------------------------- checking


def _checked(rows: Iterable[Row | str], fields: FieldsConfig, notes: list[str]) -> list[Problem]:
    """Problems of all rows, in their order.

    Raises:
        ProblemsError: naming every row that is no problem.
    """
    problems: list[Problem] = []
    errors: list[str] = []
    blank: list[str] = []
    places: dict[str, str] = {}
    same: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for row in rows:
        if isinstance(row, str):
            errors.append(row)
            continue
        where, number, columns = row
        if not columns:
            blank.append(where)
            continue
        wrong, problem = _problem(columns, fields, f"{re.split(r'[:. ]', where)[0]}-{number}")
        errors.extend(f"{where}: {what}" for what in wrong)
        if problem is None:
            continue
        if problem.id in places:
            errors.append(f"{where}: the id {problem.id!r} is also that of {places[problem.id]}; make it unique")
            continue
        places[problem.id] = where
        same.setdefault(normalised(problem.question), []).append((where, problem.answers))
        problems.append(problem)
    if not problems and not errors:
        errors.append("it has no problems; give a source with at least one row")
    if errors:
        raise ProblemsError(errors)
    _note_duplicates(same, notes)
    if blank:
        notes.append(f"{len(blank)} blank lines skipped: {_some(blank)}")
    return problems


def _note_duplicates(same: Mapping[str, list[tuple[str, tuple[str, ...]]]], notes: list[str]) -> None:
    repeated = [group for group in same.values() if len(group) > 1]
    if repeated:
        pairs = [" = ".join(where for where, _ in group) for group in repeated]
        notes.append(f"{len(repeated)} questions stand there more than once: {_some(pairs)}")
    disputed = [group for group in repeated if len({answers for _, answers in group}) > 1]
    if disputed:
        pairs = [" / ".join(where for where, _ in group) for group in disputed]
        notes.append(f"{len(disputed)} of these with different answers, so some are wrong: {_some(pairs)}")


def _some(items: Sequence[str], shown: int = 5) -> str:
    return ", ".join(items[:shown]) + (", ..." if len(items) > shown else "")


def _problem(columns: Mapping[str, Any], fields: FieldsConfig, numbered: str) -> tuple[list[str], Problem | None]:
    """What is wrong with a row; its problem when nothing is."""
    wrong: list[str] = []
    for name, column in (("question", fields.question), ("answer", fields.answer)):
        if column not in columns:
            wrong.append(f"no column {column!r} (there are: {', '.join(columns)}); set problems.fields.{name}")
    if wrong:
        return wrong, None
    question = columns[fields.question]
    if question is None or (isinstance(question, str) and not question.strip()):
        wrong.append("the question is empty")
    elif not isinstance(question, str):
        wrong.append(f"the question is a {type(question).__name__}, not text")
    answers, complaint = _answers(columns[fields.answer])
    if complaint:
        wrong.append(complaint)
    identity = columns.get(fields.id)
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        wrong.append(f"the id {identity!r} is neither text nor a whole number")
    elif isinstance(identity, str) and not identity.strip():
        wrong.append("the id is empty; leave the column out to have rows numbered")
    difficulty, complaint = _difficulty(columns.get(fields.difficulty))
    if complaint:
        wrong.append(complaint)
    synthetic = columns.get(fields.synthetic)
    if synthetic not in (None, False, True):
        wrong.append(f"{fields.synthetic} is {synthetic!r}; it must be true or false")
    if wrong:
        return wrong, None
    name = numbered if identity is None else str(identity)
    return [], Problem(name, str(question), answers, difficulty, bool(synthetic))


def _answers(value: Any) -> tuple[tuple[str, ...], str]:
    """Gold alternatives, and what is wrong with them ("" when nothing)."""
    alternatives = list(value) if isinstance(value, list | tuple) else [value]
    texts = []
    for answer in alternatives:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            kind = "missing" if answer is None else f"a {type(answer).__name__}"
            return (), f"the answer is {kind}; it must be text, a number, or a list of them"
        if isinstance(answer, float) and not math.isfinite(answer):
            return (), f"the answer {answer} cannot be graded"
        text = str(answer).strip()
        if not text:
            return (), "the answer is empty"
        if len(text) > MAX_ANSWER_CHARACTERS:
            return (), (
                f"the answer has {len(text)} characters and cannot be graded; give the final answer, not the solution"
            )
        if text.count("{") - text.count("\\{") != text.count("}") - text.count("\\}"):
            return (), f"the answer {text!r} cannot be graded: its braces do not match"
        texts.append(text)
    return (tuple(texts), "") if texts else ((), "the list of answers is empty")


def _difficulty(value: Any) -> tuple[int | None, str]:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value, ""
    if isinstance(value, float) and value.is_integer():
        return int(value), ""
    # MATH and its kin write "Level 3".
    match = re.fullmatch(r"\D*(\d+)", value.strip()) if isinstance(value, str) else None
    if match:
        return int(match[1]), ""
    return None, f"the difficulty {value!r} is no whole number"


# --------------------------------------------------------------------------- splitting


def _order(seed: int, purpose: str, identity: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{identity}".encode()).digest()


def _hold_out(problems: list[Problem], size: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Split off `size` problems whose question stands there once, chosen by hash of seed and id."""
    counts: dict[str, int] = {}
    for problem in problems:
        text = normalised(problem.question)
        counts[text] = counts.get(text, 0) + 1
    single = [p for p in problems if counts[normalised(p.question)] == 1]
    if size > len(single) or size >= len(problems):
        raise ProblemsError(
            [
                f"problems.test_size={size} cannot be held out of {len(problems)} problems ({len(single)} "
                f"without a duplicate) with some left to train on; lower it, or give problems.test_path"
            ]
        )
    chosen = sorted(single, key=lambda p: _order(seed, "test", p.id))[:size]
    held_out = {problem.id for problem in chosen}
    return [p for p in problems if p.id not in held_out], chosen


def _without_held_out(train: list[Problem], test: list[Problem], notes: list[str]) -> list[Problem]:
    """Training problems whose question is not held out; the same id with another question is an error."""
    texts = {normalised(p.question) for p in test}
    kept = [p for p in train if normalised(p.question) not in texts]
    dropped = [p.id for p in train if normalised(p.question) in texts]
    if dropped:
        notes.append(f"{len(dropped)} training problems are held out and were dropped: {_some(dropped)}")
    ids = {p.id for p in test}
    clashes = [p.id for p in kept if p.id in ids]
    if clashes:
        raise ProblemsError(
            [f"ids stand for one question in training and another held out: {_some(clashes)}; make them unique"]
        )
    if not kept:
        raise ProblemsError(["all training problems are held out by problems.test_path; give another one"])
    return kept


def _assert_disjoint(problems: ProblemSet) -> None:
    ids = {p.id for p in problems.train} & {p.id for p in problems.test}
    train = {normalised(p.question) for p in problems.train}
    texts = [p.id for p in problems.test if normalised(p.question) in train]
    if ids or texts:
        shared = sorted(ids | set(texts))
        raise ProblemsError([f"{len(shared)} held-out problems are also in training: {_some(shared)}"])
