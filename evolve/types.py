"""The glossary: every kind of data that flows between the parts.

All of it is plain, immutable data. Nothing here imports torch, ray or vllm, so that the algorithms
built on it can be read and tested without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from evolve.schema import Generator, Rule, ValueKind

# --------------------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer. Everything is keyed by `id`, never by the question's text."""

    id: str
    question: str
    answers: tuple[str, ...]
    """Gold alternatives; an answer equal to any one of them is correct."""
    difficulty: int | None = None
    """A level given by the data set (1 = easiest), used only to group reports."""
    synthetic: bool = False
    """Made by a model, so that its gold answer may be wrong; selection is stricter with these."""


# --------------------------------------------------------------------------- rounds


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """How one round's trees are grown: its own settings, the rest inherited from `search`."""

    round: int
    """1 for the first."""
    generator: Generator
    value: ValueKind
    rollouts: int
    candidates: int
    exploration: float
    trees: int
    retry_trees: int
    escalation: tuple[int, ...]
    rule: Rule = Rule.uct
    settled: int | None = None


# --------------------------------------------------------------------------- execution


class Status(StrEnum):
    """What became of one execution."""

    OK = "ok"
    """The code ran to its end."""
    ERROR = "error"
    """The code raised an exception (or is not Python)."""
    TIMEOUT = "timeout"
    """The code was killed because it used up its CPU or wall time."""
    OOM = "oom"
    """The code was killed because it used up its memory."""
    CRASH = "crash"
    """The interpreter died of the code (segmentation fault, forbidden system call)."""
    REFUSED = "refused"
    """The code was not run, or its result not believed: too long, or it forged protocol frames."""
    INFRASTRUCTURE = "infrastructure"
    """The sandbox failed, not the code. Retried, counted, never a label."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The typed outcome of executing one step's code after its prefix."""

    status: Status
    stdout: str = ""
    """What this step alone printed, capped."""
    truncated: bool = False
    """Whether `stdout` was cut at the cap."""
    exception: str = ""
    """The exception's type name, for `ERROR`."""
    message: str = ""
    """The exception's message, or why the code was refused or the sandbox failed."""
    line: int | None = None
    """1-based line of this step's code that raised, where known."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    replayed: bool = False
    """The prefix had been evicted and was executed again to get here."""
    deterministic: bool = True
    """False when a replayed prefix did not print what it had printed before, or failed."""

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


class Outcome(StrEnum):
    """What grading an answer against the gold answers found."""

    CORRECT = "correct"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    """The comparison did not end in time, in memory or in stack; such an answer is neither correct nor wrong."""
    INFRASTRUCTURE = "infrastructure"
    """The grader failed; retried, counted, never a label."""


# --------------------------------------------------------------------------- steps


@dataclass(frozen=True, slots=True)
class Step:
    """A parsed reasoning step: a comment and the code that carries it out."""

    text: str
    code: str
    final: bool
    """Whether this step ends the code, so that its printed output is the solution's result."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed final answer, stated in words after the code has ended."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Text that is no step: cut off, empty, or with a boundary where none may be."""

    text: str
    reason: str


Parsed = Step | Answer | Invalid


@dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation as the policy sampled it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural-log probability of each token of `token_ids`, at temperature 1."""
    truncated: bool = False
    """Sampling ended at the token limit and not at a boundary."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `seed` makes a request repeatable on an idle engine."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end a sample; they are kept in its text."""
    seed: int | None = None


# --------------------------------------------------------------------------- what search yields


class NodeKind(StrEnum):
    """What a node of a tree stands for."""

    ROOT = "root"
    STEP = "step"
    """Executed code that the solution can continue from."""
    TERMINAL = "terminal"
    """A complete solution with an answer that was graded."""
    DEAD = "dead"
    """Nothing can follow: the code failed, the text was no step, or the depth limit was reached."""
    LOST = "lost"
    """The sandbox or the grader failed on it, or on what might have followed it: neither right nor wrong."""

    @property
    def live(self) -> bool:
        """Whether a search may enter such a node."""
        return self not in (NodeKind.DEAD, NodeKind.LOST)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A complete solution: a path from a tree's root to one of its terminals. One SFT row."""

    problem_id: str
    round: int
    tree: int
    node: int
    """Id of the terminal within its tree."""
    correct: bool
    q: float
    """Mean Q-value over the nodes of the path, root excluded."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Everything after the prompt, as sampled; text inserted by the environment included."""
    sampled: tuple[bool, ...]
    """For each of `token_ids`, whether the policy sampled it. Only those are trained on."""
    text: str
    answer: str
    logprob: float
    """Summed log-probability of the sampled tokens under the policy that sampled them."""


@dataclass(frozen=True, slots=True)
class StepPair:
    """A better and a worse continuation of one prefix. One PPM row.

    Token ids are as sampled; prefix and continuation are never tokenised together again.
    """

    problem_id: str
    round: int
    tree: int
    node: int
    """Id of the node that both continue; pairs of one node share the weight 1."""
    kind: str
    """`step` (siblings) or `trajectory` (whole solutions from the root)."""
    prefix_ids: tuple[int, ...]
    positive_ids: tuple[int, ...]
    negative_ids: tuple[int, ...]
    positive_sampled: tuple[bool, ...]
    negative_sampled: tuple[bool, ...]
    positive_q: float
    negative_q: float
    weight: float


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prefix to be valued by a PPM: prompt and steps so far, as token ids.

    `steps[i]` are the ids of the i-th step after `prompt_ids`; `sampled[i]` marks those of them
    that the policy sampled (and not the environment inserted).
    """

    prompt_ids: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    sampled: tuple[tuple[bool, ...], ...]


# --------------------------------------------------------------------------- seams


class StepFormat(Protocol):
    """The text conventions between policy, search and verifier."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Boundary strings that end a sample."""
        ...

    def prompt(self, question: str) -> str:
        """Everything that precedes the first step."""
        ...

    def parse(self, text: str, code_ended: bool) -> Parsed:
        """Read one sampled continuation. `code_ended`: the prefix's code is complete already."""
        ...

    def inserted(self, step: Step, stdout: str) -> str:
        """Text the environment puts after a step (its output, say); empty when none."""
        ...

    def result(self, step: Step, stdout: str) -> str | None:
        """The answer, when a final step's printed output is the answer; else None."""
        ...


class Policy(Protocol):
    """What proposes steps."""

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        """`n` continuations of each prefix (token ids), in the prefixes' order."""
        ...

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts, with no special tokens added."""
        ...


class Verifier(Protocol):
    """What executes and grades."""

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        """Execute `step` in the interpreter state left by `parent`, the code of the steps before it."""
        ...

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        """Compare `answer` with the problem's gold answers."""
        ...

    async def group(self, answers: Sequence[str]) -> list[int]:
        """For each answer the index of the first of its group of equal ones; for votes."""
        ...

    async def stats(self) -> Mapping[str, float]:
        """Counters since the start: executions, replays, evictions, restarts, infrastructure failures…"""
        ...


class Reward(Protocol):
    """What values a step."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Values in [-1, 1], one a request; siblings are best sent together."""
        ...


@runtime_checkable
class Learner(Protocol):
    """What improves a model."""

    def fit(self, initial: str, rows: Sequence[Any], output: str) -> dict[str, float]:
        """Train the checkpoint at `initial` on `rows`, publish it at `output`, return metrics."""
        ...


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One line of an evaluation table: a method, what it got right, and what that cost."""

    method: str
    accuracy: Interval
    problems: int
    tokens: int
    """Tokens generated by the policy over all problems."""
    scored_tokens: int = 0
    """Tokens read by the PPM over all problems."""
    detail: Mapping[str, float] = field(default_factory=dict)
