"""Engines without a model, for tests of what happens around them; what they say depends on prefix and seed alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from evolve.errors import EvolveError
from evolve.policy.simulated import decode, encode
from evolve.search.seeds import derive
from evolve.types import Candidate, Sampling, ScoreRequest

STEPS = ("a = 1\n<end_of_step>", "a = 2\n<end_of_step>", "print(3)\n<end_of_code>", "print(4)\n<end_of_code>")


class DoublePolicy:
    """Stands where `PolicyEngine` does. What a file beside `model` says happens to it:

    `model/refuse`: it cannot be started, for good; `model/crash`: its process ends while it starts; `model/fail`: an
    exception while it starts; `model/die`: the process ends at the next request, and the file goes with it.
    """

    def __init__(self, model: str, config: Any, digest: str | None = None, device: str = "cpu") -> None:
        self.path, self.digest = model, digest or "none"

    def _told(self, what: str, once: bool = False) -> bool:
        file = Path(self.path) / what
        told = file.exists()
        if told and once:
            file.unlink()
        return told

    async def start(self) -> None:
        if self._told("refuse"):
            raise EvolveError("the checkpoint is another one")
        if self._told("fail"):
            raise RuntimeError("no memory left")
        if self._told("crash"):
            os._exit(70)

    async def reload(self, path: str, digest: str) -> None:
        self.path, self.digest = path, digest

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        if self._told("die", once=True):
            os._exit(70)
        rng = Random(derive(sampling.seed, prefixes))
        await asyncio.sleep(0.01 * rng.random())
        texts = [rng.choice(STEPS) for _ in range(n)]
        return [[Candidate(text, encode(text), (-0.5,) * len(encode(text))) for text in texts] for _ in prefixes]

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [encode(text) for text in texts]

    async def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return [decode(ids) for ids in sequences]

    async def stats(self) -> Mapping[str, float]:
        return {"generated_tokens": 1.0, "occupancy": 0.5}

    async def close(self) -> None:
        pass


class DoublePPM(DoublePolicy):
    """Stands where `PPMEngine` does."""

    def __init__(
        self, model: str, form: Any, scale: float, config: Any, digest: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(model, config, digest)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        return [1.0 / (1 + len(request.steps)) for request in requests]

    async def score_steps(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        return [[0.5 for _ in request.steps] for request in requests]
