"""Expansion: sample candidates for a node, execute them, grade what is finished, score what survives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from evolve.search.rule import TreePolicy
from evolve.search.seeds import derive
from evolve.tree import Tree
from evolve.types import (
    Answer,
    Candidate,
    Invalid,
    NodeKind,
    Outcome,
    Policy,
    Problem,
    Reward,
    Sampling,
    Status,
    Step,
    StepFormat,
    Verdict,
    Verifier,
)


@dataclass(slots=True)
class Sibling:
    """One distinct candidate of an expansion, before it becomes a node."""

    candidate: Candidate
    parsed: Step | Answer | Invalid
    copies: int
    verdict: Verdict | None = None
    outcome: Outcome | None = None
    result: str | None = None
    inserted: tuple[int, ...] = ()

    @property
    def broke(self) -> bool:
        """Whether the sandbox failed, which may not happen again, where a grading that does not end does."""
        failed = self.verdict is not None and self.verdict.status is Status.INFRASTRUCTURE
        return failed or self.outcome is Outcome.INFRASTRUCTURE

    @property
    def lost(self) -> str:
        """How the sandbox or the grader, and not the code, failed; empty when neither did."""
        if self.verdict is not None and self.verdict.status is Status.INFRASTRUCTURE:
            return f"the sandbox failed: {self.verdict.message}"
        if self.outcome in (Outcome.INFRASTRUCTURE, Outcome.TIMEOUT):
            return f"grading ended with {self.outcome}"
        return ""


@dataclass(slots=True)
class Expander:
    """Turns a leaf into a node with children. Holds the services, no state of any tree."""

    policy: Policy
    verifier: Verifier
    format: StepFormat
    sampling: Sampling
    candidates: int
    max_depth: int
    reward: Reward | None = None
    """A PPM that scores every surviving child; None when values start from terminals alone."""
    context: int | None = None
    """Longest sequence the policy's engine takes, tokens; None: any. A step after which no other one fits is dead."""

    async def expand(self, tree: Tree, problem: Problem, node: int, rule: TreePolicy) -> None:
        """Add the children of `node`. Dead and lost candidates become children too, as a record; none is selected.

        When none is live, those that the sandbox lost are judged once more; a node that this does not help is lost too.
        """
        prefix = tree.prefix_ids(node)
        sampling = replace(self.sampling, seed=derive(tree.seed, *tree.continuation_ids(node)))
        [sampled] = await self.policy.propose([prefix], self.candidates, sampling)
        tree.sampled_tokens += sum(len(c.token_ids) for c in sampled)
        siblings = self._distinct(sampled, tree.code_ended[node])
        kinds = await self._judge_all(tree, problem, node, siblings, siblings)
        if not any(kind.live for kind in kinds):
            kinds = await self._judge_all(tree, problem, node, siblings, [s for s in siblings if s.broke])
        values = await self._values(tree, node, siblings, kinds, rule)
        for sibling, kind, value in zip(siblings, kinds, values, strict=True):
            _attach(tree, node, sibling, kind, value)
        tree.expanded_at[node] = tree.rollouts
        tree.close_lost(node)

    def _distinct(self, sampled: list[Candidate], code_ended: bool) -> list[Sibling]:
        """Candidates with the same text are one sibling: executed once, counted in `copies`."""
        by_text: dict[str, Sibling] = {}
        for candidate in sampled:
            if (known := by_text.get(candidate.text)) is not None:
                known.copies += 1
                continue
            parsed = (
                Invalid(candidate.text, "cut off at the token limit")
                if candidate.truncated
                else self.format.parse(candidate.text, code_ended)
            )
            by_text[candidate.text] = Sibling(candidate, parsed, 1)
        return list(by_text.values())

    async def _judge_all(
        self, tree: Tree, problem: Problem, node: int, siblings: list[Sibling], which: list[Sibling]
    ) -> list[NodeKind]:
        """Judge `which` of the siblings at once, and count the sandbox's failures; what each of `siblings` becomes."""
        await asyncio.gather(*(self._judge(tree, problem, node, s) for s in which))
        reasons = [s.lost for s in which if s.lost]
        tree.infrastructure_failures += sum(s.broke for s in which)
        if reasons:
            tree.note = tree.note or f"{len(reasons)} of {len(siblings)} candidates were lost: {reasons[0]}"
        return [self._kind(tree, node, s) for s in siblings]

    async def _judge(self, tree: Tree, problem: Problem, node: int, sibling: Sibling) -> None:
        """Execute a step's code; grade it when it ends the solution; fetch what the environment inserts."""
        sibling.verdict = sibling.outcome = sibling.result = None
        parsed = sibling.parsed
        if isinstance(parsed, Answer):
            sibling.result = parsed.answer
        elif isinstance(parsed, Step):
            sibling.verdict = await self.verifier.check(problem, tree.prefix_code(node), parsed.code)
            if not sibling.verdict.ok:
                return
            if parsed.final:
                sibling.result = self.format.result(parsed, sibling.verdict.stdout)
            if sibling.result is None and (text := self.format.inserted(parsed, sibling.verdict.stdout)):
                [sibling.inserted] = await self.policy.encode([text])
        if sibling.result is not None:
            sibling.outcome = await self.verifier.grade(problem, sibling.result)

    def _kind(self, tree: Tree, node: int, sibling: Sibling) -> NodeKind:
        """What a judged sibling becomes."""
        if sibling.lost:
            return NodeKind.LOST
        if sibling.outcome in (Outcome.CORRECT, Outcome.WRONG):
            return NodeKind.TERMINAL
        runs = isinstance(sibling.parsed, Step) and sibling.verdict is not None and sibling.verdict.ok
        goes_on = runs and tree.depth[node] + 1 < self.max_depth and self._has_room(tree, node, sibling)
        return NodeKind.STEP if goes_on else NodeKind.DEAD

    def _has_room(self, tree: Tree, node: int, sibling: Sibling) -> bool:
        """Whether a further step fits behind a sibling: what it printed may be long."""
        if self.context is None:
            return True
        length = len(tree.prefix_ids(node)) + len(sibling.candidate.token_ids) + len(sibling.inserted)
        return length + self.sampling.max_tokens <= self.context

    async def _values(
        self, tree: Tree, node: int, siblings: list[Sibling], kinds: list[NodeKind], rule: TreePolicy
    ) -> list[float]:
        """Initial values of the siblings; those that live are scored in one request, the others are 0."""
        live = [s for s, kind in zip(siblings, kinds, strict=True) if kind.live]
        scores: list[float] | list[None] = [None] * len(live)
        if self.reward is not None and live:
            requests = tree.score_requests(node, [(s.candidate.token_ids, s.inserted) for s in live])
            tree.scored_tokens += sum(len(r.prompt_ids) + sum(map(len, r.steps)) for r in requests)
            scores = await self.reward.score(requests)
        values = [0.0] * len(siblings)
        places = (place for place, kind in enumerate(kinds) if kind.live)
        for place, score in zip(places, scores, strict=True):
            values[place], tree.prior_weight = rule.initial_value(score)
        return values


def _attach(tree: Tree, node: int, sibling: Sibling, kind: NodeKind, value: float) -> None:
    """Make the sibling a node."""
    parsed, verdict = sibling.parsed, sibling.verdict
    tree.add(
        node,
        kind,
        sibling.candidate.text,
        parsed.code if isinstance(parsed, Step) else "",
        sibling.candidate.token_ids,
        sibling.candidate.logprobs,
        inserted_ids=sibling.inserted,
        copies=sibling.copies,
        status=verdict.status if verdict else Status.REFUSED if isinstance(parsed, Invalid) else Status.OK,
        stdout=verdict.stdout if verdict else "",
        answer=sibling.result,
        correct=sibling.outcome is Outcome.CORRECT if kind is NodeKind.TERMINAL else None,
        code_ended=tree.code_ended[node] or (isinstance(parsed, Step) and parsed.final),
        prior=value,
    )
