"""Sampling whole solutions: what search is compared with, at a fraction of its requests.

The code is sampled in one go to its end, executed once as a whole, and, where the format asks for it, the answer
is sampled after the output was inserted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from evolve.policy.formats import END_OF_STEP, last_boxed
from evolve.types import (
    Answer,
    Candidate,
    Outcome,
    Policy,
    Problem,
    Sampling,
    ScoreRequest,
    Status,
    Step,
    StepFormat,
    Verifier,
)

T = TypeVar("T")


@dataclass(slots=True)
class Solution:
    """One sampled solution attempt, finished or not."""

    text: str
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprob: float
    """Summed log-probability of the sampled tokens at temperature 1."""
    answer: str | None = None
    outcome: Outcome | None = None

    @property
    def tokens(self) -> int:
        """Tokens the policy generated."""
        return sum(self.sampled)

    def score_request(self, prompt_ids: tuple[int, ...]) -> ScoreRequest:
        """The whole solution as one continuation of the prompt."""
        return ScoreRequest(prompt_ids, (self.token_ids,), (self.sampled,))


@dataclass(slots=True)
class Sampler:
    """Samples, executes and grades whole solutions."""

    policy: Policy
    verifier: Verifier
    format: StepFormat
    sampling: Sampling
    """`max_tokens` bounds the whole code, and again the answer."""

    async def solve(self, problem: Problem, prompt_ids: tuple[int, ...], n: int, seed: int) -> list[Solution]:
        """`n` graded solutions. An empty list when the prompt leaves no room for one."""
        code_stop = tuple(s for s in self.format.stop if s != END_OF_STEP)
        sampling = replace(self.sampling, stop=code_stop, seed=seed)
        [candidates] = await self.policy.propose([prompt_ids], n, sampling)
        solutions = [_begun(candidate) for candidate in candidates]
        executed = await _once_each((s.text for s in solutions), lambda text: self._execute(problem, text))
        finishing = []
        for number, solution in enumerate(solutions):
            solution.answer, inserted = executed[solution.text]
            if inserted:
                own = replace(sampling, seed=seed + n + number)
                finishing.append(self._answer(solution, prompt_ids, inserted, own))
        await asyncio.gather(*finishing)
        for solution in solutions:
            if solution.answer is None:
                solution.answer = last_boxed(solution.text)
        answers = (s.answer for s in solutions if s.answer is not None)
        outcomes = await _once_each(answers, lambda answer: self._grade(problem, answer))
        for solution in solutions:
            if solution.answer is not None:
                solution.outcome = outcomes[solution.answer]
        return solutions

    async def _execute(self, problem: Problem, text: str) -> tuple[str | None, str]:
        """(answer, text to insert) after running the solution's code; (None, "") when it does not run."""
        steps = [self.format.parse(piece, False) for piece in split_steps(text, self.format.stop)]
        if not steps or not all(isinstance(step, Step) for step in steps):
            return None, ""
        last = steps[-1]
        if not isinstance(last, Step) or not last.final:
            return None, ""
        code = "\n".join(step.code for step in steps if isinstance(step, Step))
        verdict = await self.verifier.check(problem, (), code)
        if verdict.status is Status.INFRASTRUCTURE:
            verdict = await self.verifier.check(problem, (), code)
        if not verdict.ok:
            return None, ""
        return self.format.result(last, verdict.stdout), self.format.inserted(last, verdict.stdout)

    async def _grade(self, problem: Problem, answer: str) -> Outcome:
        outcome = await self.verifier.grade(problem, answer)
        return outcome if outcome is not Outcome.INFRASTRUCTURE else await self.verifier.grade(problem, answer)

    async def _answer(self, solution: Solution, prompt_ids: tuple[int, ...], inserted: str, sampling: Sampling) -> None:
        """Let the policy state its answer after the output."""
        [ids] = await self.policy.encode([inserted])
        prefix = prompt_ids + solution.token_ids + tuple(ids)
        [candidates] = await self.policy.propose([prefix], 1, sampling)
        if not candidates:
            return
        [candidate] = candidates
        solution.text += inserted + candidate.text
        solution.token_ids += tuple(ids) + candidate.token_ids
        solution.sampled += (False,) * len(ids) + (True,) * len(candidate.token_ids)
        solution.logprob += sum(candidate.logprobs)
        parsed = self.format.parse(candidate.text, True)
        if isinstance(parsed, Answer):
            solution.answer = parsed.answer


async def _once_each(texts: Iterable[str], work: Callable[[str], Awaitable[T]]) -> dict[str, T]:
    """What `work` makes of each text; of equal ones once, and all at the same time."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, await asyncio.gather(*map(work, distinct)), strict=True))


def split_steps(text: str, boundaries: Sequence[str]) -> list[str]:
    """A solution's text cut after every boundary; what follows the last one is left out."""
    pattern = "|".join(re.escape(boundary) for boundary in boundaries)
    return re.findall(rf".*?(?:{pattern})", text, re.DOTALL)


def _begun(candidate: Candidate) -> Solution:
    return Solution(candidate.text, candidate.token_ids, (True,) * len(candidate.token_ids), sum(candidate.logprobs))
