"""Evaluation on held-out problems: what the policy solves alone, with votes, and with its PPM, and what each costs.

`Evaluator` collects one record a problem; `table` turns records into rows with 95 % intervals. All methods of one
table see the same problems, and best-of-N, votes and pass@k the same samples, so that their differences are paired.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from evolve.policy.formats import format_named
from evolve.search.beam import Beam, chosen
from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.sample import Sampler
from evolve.search.seeds import derive
from evolve.search.uct import UCT
from evolve.service import RemotePolicy, RemoteReward, RemoteVerifier, ServiceClient
from evolve.tree import Tree
from evolve.types import EvalRow, Interval, Outcome, Problem, Sampling


@dataclass(frozen=True, slots=True)
class EvalJob:
    """How to evaluate one policy (and its PPM)."""

    round: int
    run_seed: int
    format: str
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    """Of a whole solution's code."""
    max_step_tokens: int
    max_depth: int
    context: int
    """Longest sequence the policy's engine takes, tokens."""
    concurrent: int
    """Problems at work at once in one evaluator."""
    policy: tuple[str, str]
    """Path and digest of the policy's checkpoint."""
    ppm: tuple[str, str] | None = None
    """The PPM's; None leaves out what needs one."""
    searched: frozenset[str] = frozenset()
    """Ids of the problems that beam and PPM-guided search are run on."""
    beam_width: int = 0
    beam_candidates: int = 0
    search_rollouts: int = 0
    search_candidates: int = 0

    def digest(self) -> str:
        """Identifies everything that records depend on, the problems themselves and the engines' numerics aside."""
        known = asdict(self) | {"policy": self.policy[1], "ppm": self.ppm and self.ppm[1]}
        known["searched"] = sorted(self.searched)
        del known["concurrent"]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Sample:
    """One sampled solution in a record."""

    correct: bool
    group: int
    """Index of the first sample with an equal answer; -1 without an answer."""
    tokens: int
    logprob: float
    score: float | None = None
    """The PPM's raw score of the whole solution; None without a PPM or an answer."""


@dataclass(slots=True)
class Found:
    """What a PPM-guided search chose."""

    correct: bool
    tokens: int
    scored_tokens: int


@dataclass(slots=True)
class Record:
    """Everything measured on one problem."""

    problem_id: str
    difficulty: int | None
    greedy_correct: bool
    greedy_tokens: int
    samples: list[Sample] = field(default_factory=list)
    scored_tokens: int = 0
    """Tokens the PPM read to score `samples`."""
    beam: Found | None = None
    search: Found | None = None
    skipped: bool = False
    """The prompt left no room for a solution."""


class Evaluator:
    """Evaluates problems on one shard's engines; use as an asyncio Ray actor."""

    def __init__(self, name: str, policy: Any, verifier: Any, ppm: Any | None, timeout_s: float) -> None:
        self.policy = RemotePolicy(ServiceClient(policy, f"policy engine of {name}", timeout_s))
        self.verifier = RemoteVerifier(ServiceClient(verifier, f"verifier of {name}", timeout_s))
        self.reward = RemoteReward(ServiceClient(ppm, f"PPM engine of {name}", timeout_s)) if ppm else None
        self._finished: list[dict[str, Any]] = []

    async def evaluate(self, problems: Sequence[Problem], job: EvalJob) -> list[dict[str, Any]]:
        """One `Record` a problem, as a dictionary, in the problems' order.

        Raises:
            ServiceError: an engine or the verifier did not answer.
        """
        self._finished = finished = []
        self.policy.client.expects = job.policy
        if self.reward is not None:
            self.reward.client.expects = job.ppm
        room = asyncio.Semaphore(job.concurrent)

        async def one(problem: Problem) -> dict[str, Any]:
            async with room:
                record = asdict(await self._record(problem, job))
                finished.append(record)
                return record

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(problem)) for problem in problems]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def finished(self, start: int) -> list[dict[str, Any]]:
        """Records of the evaluation under way in the order in which they came, from the `start`-th on."""
        return self._finished[start:]

    async def _record(self, problem: Problem, job: EvalJob) -> Record:
        fmt = format_named(job.format)
        [prompt] = await self.policy.encode([fmt.prompt(problem.question)])
        prompt = tuple(prompt)
        seed = derive("evaluate", job.run_seed, job.round, problem.id)
        bare = Problem(problem.id, "", problem.answers)
        greedy_sampler = Sampler(self.policy, self.verifier, fmt, Sampling(0.0, 1.0, job.max_tokens))
        greedy = await greedy_sampler.solve(bare, prompt, 1, seed)
        record = Record(
            problem_id=problem.id,
            difficulty=problem.difficulty,
            greedy_correct=any(s.outcome is Outcome.CORRECT for s in greedy),
            greedy_tokens=sum(s.tokens for s in greedy),
            skipped=not greedy,
        )
        if not record.skipped:
            await self._sample(bare, prompt, job, seed + 1, record)
            if job.ppm is not None and problem.id in job.searched:
                record.beam = await self._beam(bare, prompt, job, seed + 2)
                record.search = await self._search(bare, prompt, job, seed + 3)
        return record

    async def _sample(self, problem: Problem, prompt: tuple[int, ...], job: EvalJob, seed: int, record: Record) -> None:
        fmt = format_named(job.format)
        sampler = Sampler(self.policy, self.verifier, fmt, Sampling(job.temperature, job.top_p, job.max_tokens))
        solutions = await sampler.solve(problem, prompt, job.samples, seed)
        record.samples = [Sample(s.outcome is Outcome.CORRECT, -1, s.tokens, s.logprob) for s in solutions]
        answered = [i for i, s in enumerate(solutions) if s.answer is not None]
        if not answered:
            return
        groups = await self.verifier.group([solutions[i].answer or "" for i in answered])
        for i, first in zip(answered, groups, strict=True):
            record.samples[i].group = answered[first]
        if job.ppm is None or self.reward is None:
            return
        distinct = {solutions[i].token_ids: solutions[i].score_request(prompt) for i in answered}
        scored = await self.reward.score_steps(list(distinct.values()))
        scores = {ids: steps[-1] for ids, steps in zip(distinct, scored, strict=True)}
        record.scored_tokens = sum(len(prompt) + len(ids) for ids in distinct)
        for i in answered:
            record.samples[i].score = scores[solutions[i].token_ids]

    async def _beam(self, problem: Problem, prompt: tuple[int, ...], job: EvalJob, seed: int) -> Found | None:
        if not job.beam_width:
            return None
        tree = Tree(problem.id, job.round, 0, seed, prompt)
        await Beam(self._expander(job, job.beam_candidates), job.beam_width).grow(tree, problem)
        return _found(tree)

    async def _search(self, problem: Problem, prompt: tuple[int, ...], job: EvalJob, seed: int) -> Found | None:
        if not job.search_rollouts:
            return None
        tree = Tree(problem.id, job.round, 0, seed, prompt)
        rule = UCT(rollouts=job.search_rollouts, exploration=1.0, augmented=True)
        expander = self._expander(job, job.search_candidates)
        await MCTS(expander, rule, terminals_by_ppm=True).grow(tree, problem)
        return _found(tree)

    def _expander(self, job: EvalJob, candidates: int) -> Expander:
        fmt = format_named(job.format)
        sampling = Sampling(job.temperature, job.top_p, job.max_step_tokens, fmt.stop)
        return Expander(self.policy, self.verifier, fmt, sampling, candidates, job.max_depth, self.reward, job.context)


def _found(tree: Tree) -> Found:
    terminal = chosen(tree)
    return Found(
        correct=terminal is not None and bool(tree.correct[terminal]),
        tokens=tree.sampled_tokens,
        scored_tokens=tree.scored_tokens,
    )


# --------------------------------------------------------------------------- choosing among samples


def majority(record: Record) -> bool:
    """Whether the most frequent answer is correct; of equally frequent ones the first sampled."""
    return _weighted_vote(record, lambda sample: 1.0)


def _weighted_vote(record: Record, weight: Callable[[Sample], float]) -> bool:
    votes: dict[int, float] = {}
    for sample in record.samples:
        if sample.group >= 0:
            votes[sample.group] = votes.get(sample.group, 0.0) + weight(sample)
    if not votes:
        return False
    return record.samples[max(votes, key=lambda group: (votes[group], -group))].correct


def best(record: Record, value: Callable[[Sample], float | None]) -> bool:
    """Whether the sample with the highest value among those with an answer is correct."""
    valued = [(v, -i) for i, s in enumerate(record.samples) if s.group >= 0 and (v := value(s)) is not None]
    return bool(valued) and record.samples[-max(valued)[1]].correct


def pass_at(record: Record, k: int) -> float:
    """Chance that k of the samples hold a correct one: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    n, c = len(record.samples), sum(s.correct for s in record.samples)
    if n - c < k:
        return 1.0 if c else 0.0
    return 1.0 - float(np.prod([(n - c - i) / (n - i) for i in range(k)]))


def _found_correct(get: Callable[[Record], Found | None], record: Record) -> float:
    found = get(record)
    return float(found is not None and found.correct)


# --------------------------------------------------------------------------- tables


def interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Mean with its 95 % bootstrap interval over problems."""
    data = np.asarray(values, dtype=float)
    if not data.size:
        return Interval(0.0, 0.0, 0.0)
    draws = np.random.default_rng(seed).integers(0, data.size, (resamples, data.size))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


def table(records: Sequence[Record], resamples: int) -> list[EvalRow]:
    """One row a method; `detail` holds the paired difference to the majority vote, where it applies."""
    methods: list[tuple[str, Callable[[Record], float], int, int]] = []
    of: dict[str, list[Record]] = {}
    sampled = sum(s.tokens for r in records for s in r.samples)
    scored = sum(r.scored_tokens for r in records)
    k = max((len(r.samples) for r in records), default=0)
    methods.append(("greedy", lambda r: float(r.greedy_correct), sum(r.greedy_tokens for r in records), 0))
    if k:
        methods += [
            ("pass@1 sampled", lambda r: pass_at(r, 1), sampled // k, 0),
            (f"majority@{k}", lambda r: float(majority(r)), sampled, 0),
            (f"log-probability best-of-{k}", lambda r: float(best(r, lambda s: s.logprob)), sampled, 0),
        ]
        if scored:
            methods.append((f"PPM best-of-{k}", lambda r: float(best(r, lambda s: s.score)), sampled, scored))
        methods.append((f"pass@{k}", lambda r: pass_at(r, k), sampled, 0))
    for name, get in (("PPM beam", lambda r: r.beam), ("PPM-guided MCTS", lambda r: r.search)):
        found = [f for r in records if (f := get(r)) is not None]
        if found:
            of[name] = [r for r in records if get(r) is not None]
            methods.append(
                (
                    name,
                    partial(_found_correct, get),
                    sum(f.tokens for f in found),
                    sum(f.scored_tokens for f in found),
                )
            )
    rows = []
    for name, value, tokens, scored_tokens in methods:
        measured = of.get(name, list(records))
        values = [value(r) for r in measured]
        detail: dict[str, float] = {}
        if k and name.startswith("PPM"):
            for label, other in (("majority", majority), ("logprob", lambda r: best(r, lambda s: s.logprob))):
                paired = interval([v - float(other(r)) for v, r in zip(values, measured, strict=True)], resamples)
                detail |= {f"minus_{label}": paired.value, f"minus_{label}_low": paired.low}
                detail[f"minus_{label}_high"] = paired.high
        rows.append(EvalRow(name, interval(values, resamples), len(measured), tokens, scored_tokens, detail))
    return rows


def record_from(row: dict[str, Any]) -> Record:
    """A record from its dictionary form."""
    found = {key: Found(**row[key]) if row[key] else None for key in ("beam", "search")}
    return Record(**{**row, **found, "samples": [Sample(**sample) for sample in row["samples"]]})
