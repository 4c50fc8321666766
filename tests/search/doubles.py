"""A small deterministic world for testing search without an engine: sums of digits, one addend a step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random

from evolve.search.seeds import derive
from evolve.types import (
    Candidate,
    Invalid,
    Outcome,
    Parsed,
    Problem,
    Sampling,
    ScoreRequest,
    Status,
    Step,
    Verdict,
)

BOUNDARY = 10


class DigitFormat:
    """A step is `+d;` (goes on), `=;` (prints the sum), or anything else (invalid)."""

    stop = (";",)

    def prompt(self, question: str) -> str:
        return question

    def parse(self, text: str, code_ended: bool) -> Parsed:
        body = text.removesuffix(";")
        if not text.endswith(";") or not body:
            return Invalid(text, "no boundary")
        return Step(text, body, body == "=")

    def inserted(self, step: Step, stdout: str) -> str:
        return ""

    def result(self, step: Step, stdout: str) -> str | None:
        return stdout if step.final else None


class RandomPolicy:
    """Samples steps from a seed and the prefix alone; `delay` makes requests end out of order."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.calls = 0

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        self.calls += 1
        rng = Random(derive(sampling.seed, prefixes))
        await asyncio.sleep(self.delay * rng.random())
        return [[self._one(rng, len(prefix)) for _ in range(n)] for prefix in prefixes]

    @staticmethod
    def _one(rng: Random, length: int) -> Candidate:
        text = rng.choice(["=;", "!;", "bad", *(f"+{digit};" for digit in range(1, 4))]) if length > 3 else "+1;"
        ids = tuple(ord(character) for character in text)
        return Candidate(text, ids, tuple(-rng.random() for _ in ids), truncated=not text.endswith(";"))

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, text)) for text in texts]


class DigitVerifier:
    """Executes the digit language; `!` fails like an exception, `lose` fails like a broken sandbox."""

    def __init__(self, lose: Sequence[str] = (), outcome: Outcome | None = None) -> None:
        self.lose, self.outcome = tuple(lose), outcome
        self.checked: list[tuple[tuple[str, ...], str]] = []

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        self.checked.append((parent, step))
        if step in self.lose:
            return Verdict(Status.INFRASTRUCTURE, message="the sandbox is gone")
        if step == "!":
            return Verdict(Status.ERROR, exception="ValueError")
        total = sum(int(code) for code in parent)
        return Verdict(Status.OK, stdout=str(total) if step == "=" else "")

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        if self.outcome is not None:
            return self.outcome
        return Outcome.CORRECT if answer in problem.answers else Outcome.WRONG

    async def group(self, answers: Sequence[str]) -> list[int]:
        return [answers.index(answer) for answer in answers]

    async def stats(self) -> Mapping[str, float]:
        return {"executions": len(self.checked)}


class LengthReward:
    """Values short prefixes more."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        self.batches.append(len(requests))
        return [1.0 / (1 + len(request.steps)) for request in requests]


PROBLEM = Problem("digits-4", "sum to four", ("4",))
