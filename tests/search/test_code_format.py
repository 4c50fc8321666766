"""rStar-Math's own step format through search and sampling: code, its real output, and a boxed answer."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

import pytest

from evolve.policy.formats import CodeFormat
from evolve.schema import VerifierConfig
from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.sample import Sampler
from evolve.search.uct import UCT
from evolve.tree import Tree
from evolve.types import Candidate, NodeKind, Outcome, Problem, Sampling, Status, Verdict
from evolve.verify.service import SandboxVerifier

FORMAT = CodeFormat()
PROBLEM = Problem("trip", "16 km a day for 2 days: how far?", ("32",))

FIRST = [
    "\n<code>\n# Multiply.\ntotal = 16 * 2\n<end_of_step>",
    "\n<code>\n# Add.\ntotal = 16 + 2\n<end_of_step>",
    "\n<code>\n# Divide.\ntotal = 16 / 0\n<end_of_step>",
]
LAST = "\n# Print the answer.\nprint(total)\n<end_of_code>"


class Scripted:
    """Writes one of three first steps, prints, and states what the output says; token ids are characters."""

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        return [[self._one("".join(map(chr, prefix)), i, sampling) for i in range(n)] for prefix in prefixes]

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, text)) for text in texts]

    def _one(self, prefix: str, number: int, sampling: Sampling) -> Candidate:
        if output := re.search(r"<output>(.*)<end_of_output>\n$", prefix):
            text = rf"<answer>It is \boxed{{{output[1]}}} km.<end_of_answer>"
        elif "<code>" not in prefix:
            text = FIRST[number % len(FIRST)]
            if "<end_of_step>" not in sampling.stop:
                text += LAST
        else:
            text = LAST
        return Candidate(text, tuple(map(ord, text)), (-1.0,) * len(text), truncated=False)


@pytest.fixture
async def verifier() -> AsyncIterator[SandboxVerifier]:
    service = SandboxVerifier(VerifierConfig(supervisors=1))
    yield service
    await service.close()


async def test_search_executes_every_step_and_grades_what_the_policy_boxes(verifier: SandboxVerifier) -> None:
    policy = Scripted()
    [prompt] = await policy.encode([FORMAT.prompt(PROBLEM.question)])
    tree = Tree(PROBLEM.id, 1, 0, 0, prompt)
    expander = Expander(policy, verifier, FORMAT, Sampling(1.0, 1.0, 256, FORMAT.stop), 3, 16)
    await MCTS(expander, UCT(rollouts=6, exploration=2.0)).grow(tree, PROBLEM)

    multiply, add, divide = tree.children[0]
    assert (tree.kind[divide], tree.status[divide]) == (NodeKind.DEAD, Status.ERROR)
    assert tree.q(multiply) == 1.0
    assert tree.q(add) == -1.0
    right, wrong = (next(t for t in tree.trajectories() if t.correct is correct) for correct in (True, False))
    assert (right.answer, wrong.answer) == ("32", "18")
    solution = "".join(map(chr, right.token_ids))
    assert (
        solution == FIRST[0] + LAST + "\n<output>32<end_of_output>\n" + r"<answer>It is \boxed{32} km.<end_of_answer>"
    )
    environment = "".join(chr(i) for i, sampled in zip(right.token_ids, right.sampled, strict=True) if not sampled)
    assert environment == "\n<output>32<end_of_output>\n", "what the environment wrote is no label of SFT"


async def test_a_sampled_solution_sees_its_output_before_it_answers(verifier: SandboxVerifier) -> None:
    policy = Scripted()
    [prompt] = await policy.encode([FORMAT.prompt(PROBLEM.question)])
    solutions = await Sampler(policy, verifier, FORMAT, Sampling(1.0, 1.0, 256)).solve(PROBLEM, prompt, 3, seed=0)
    assert [solution.answer for solution in solutions[:2]] == ["32", "18"]
    assert [solution.outcome for solution in solutions[:2]] == [Outcome.CORRECT, Outcome.WRONG]
    assert solutions[2].answer is None, "its code does not run"


async def test_equal_solutions_are_executed_once_and_different_ones_at_the_same_time() -> None:
    class Counting:
        """Answers once both different programs were asked for."""

        def __init__(self) -> None:
            self.asked: list[str] = []
            self.both = asyncio.Event()

        async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
            self.asked.append(step)
            if len(self.asked) == 3:
                self.both.set()
            await asyncio.wait_for(self.both.wait(), 10)
            return Verdict(Status.OK, stdout="32")

        async def grade(self, problem: Problem, answer: str) -> Outcome:
            return Outcome.CORRECT

    policy, counting = Scripted(), Counting()
    [prompt] = await policy.encode([FORMAT.prompt(PROBLEM.question)])
    solutions = await Sampler(policy, counting, FORMAT, Sampling(1.0, 1.0, 256)).solve(PROBLEM, prompt, 6, seed=0)
    assert len(counting.asked) == len(set(counting.asked)) == 3
    assert [solution.outcome for solution in solutions] == [Outcome.CORRECT] * 6
