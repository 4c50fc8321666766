"""Engines for `benchmarks.chaos` that always say the same: the tiny world's demonstrations, right and wrong.

What they say depends on the request alone, not on time, load, the checkpoint or the process, so that a run that was
disturbed must end with what an undisturbed one ends with. Token ids are the base model's, so that it can be trained.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from evolve.fleet import Engines
from evolve.policy.checkpoint import resolve
from evolve.policy.standin import StandIn
from evolve.reward.simulated import noise
from evolve.schema import EngineConfig, EvolveConfig, ScoreForm
from evolve.search.seeds import derive
from evolve.toy.world import END_OF_CODE, END_OF_STEP, Spec, demonstrated, specs
from evolve.types import Candidate, Sampling, ScoreRequest

LATENCY_S = 0.02
"""Of a request, on the average: enough that there is something to interrupt."""


def engines(config: EvolveConfig) -> Engines:
    """The scripted engines for the problems of a configuration."""
    return Engines(partial(ScriptedPolicy, config), ScriptedPPM)


class _Scripted(StandIn):
    """A stand-in whose answers take a moment."""

    def __init__(self, model: str, digest: str | None) -> None:
        super().__init__(model, digest)
        self._requests = 0

    async def _wait(self, rng: Random) -> None:
        self._requests += 1
        await asyncio.sleep(2 * LATENCY_S * rng.random())


class ScriptedPolicy(_Scripted):
    """Stands where `PolicyEngine` does."""

    def __init__(
        self, run: EvolveConfig, model: str, config: EngineConfig, digest: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(model, digest)
        self._run = run
        self._tokens = 0

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(Path(resolve(self.path), "tokenizer.json")))

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        run, toy = self._run, self._run.toy
        train = (run.problems.per_round or 0) * len(run.rounds)
        drawn = [
            *specs(train, run.run.seed, "train", toy.difficulties, toy.operations),
            *specs(run.problems.test_size, run.run.seed, "test", toy.difficulties, toy.operations),
        ]
        return {spec.question: spec for spec in drawn}

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        """`n` continuations of each prefix: the next step, or all that are left where steps do not stop."""
        return [await self._sample(prefix, n, sampling) for prefix in prefixes]

    async def _sample(self, prefix: tuple[int, ...], n: int, sampling: Sampling) -> list[Candidate]:
        seed = derive(sampling.seed, prefix)
        await self._wait(Random(seed))
        text = self._tokenizer.decode(prefix, skip_special_tokens=False)
        spec = self._specs[text.partition("\n")[0].strip()]
        done = text.count(END_OF_STEP)
        found = []
        for number in range(n):
            rng = Random(derive(seed, number) if sampling.temperature else derive(seed))
            left = demonstrated(spec, rng)[done:]
            said = "".join(left[:1] if END_OF_STEP in sampling.stop else left) or END_OF_CODE
            ids = tuple(self._tokenizer.encode(said, add_special_tokens=False).ids)
            self._tokens += len(ids)
            found.append(Candidate(said, ids, tuple(-rng.random() for _ in ids)))
        return found

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts."""
        return [tuple(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]

    async def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token id sequences."""
        return [self._tokenizer.decode(list(ids), skip_special_tokens=False) for ids in sequences]

    async def stats(self) -> Mapping[str, float]:
        """Counters, as `PolicyEngine.stats` names them."""
        return {"requests": self._requests, "generated_tokens": self._tokens, "occupancy": 0.0}


class ScriptedPPM(_Scripted):
    """Stands where `PPMEngine` does; a score is a fixed number of the tokens of each step."""

    def __init__(
        self,
        model: str,
        form: ScoreForm,
        score_scale: float,
        config: EngineConfig,
        digest: str | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, digest)
        self._scale = score_scale

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Values in (-1, 1), one a request."""
        return [math.tanh(self._scale * math.fsum(scores)) for scores in await self.score_steps(requests)]

    async def score_steps(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """A number in [-2, 2) for every step of each request."""
        await self._wait(Random(len(requests)))
        return [[noise(step) for step in r.steps] for r in requests]

    async def stats(self) -> Mapping[str, float]:
        """Counters."""
        return {"requests": self._requests, "occupancy": 0.0}
