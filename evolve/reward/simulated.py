"""A simulated PPM engine: the pace of a real one, with scores that are noise.

Stands where `PPMEngine` stands. Every request is one forward pass over the tokens that its prefix cache lacks
(`evolve.policy.batching` says what is modelled); a score depends on the tokens of the last step alone.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from array import array
from collections.abc import Sequence

from evolve.policy.batching import ContinuousBatch, PrefixCache, Rates
from evolve.policy.standin import StandIn
from evolve.schema import EngineConfig, ScoreForm
from evolve.types import ScoreRequest


class SimulatedPPM(StandIn):
    """A `Reward` that takes as long as a real engine would; made and called like `PPMEngine`."""

    def __init__(
        self,
        model: str,
        form: ScoreForm,
        score_scale: float,
        config: EngineConfig,
        digest: str | None = None,
        device: str = "cpu",
        *,
        rates: Rates = Rates(),  # noqa: B008 (frozen)
        speed: float = 1.0,
    ) -> None:
        """`model`, `form` and `device` are not used; `config.max_num_seqs` is the number of slots."""
        super().__init__(model, digest)
        self.score_scale = score_scale
        self._batch = ContinuousBatch(rates, config.max_num_seqs, speed)
        self._cache = PrefixCache(rates.cache_tokens)
        self._requests = 0

    async def reload(self, path: str, digest: str | None = None) -> str:
        """As `StandIn.reload`; the prefix cache is emptied."""
        self._cache.clear()
        return await super().reload(path, digest)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Values in (-1, 1), one a request."""
        steps = await self.score_steps(requests)
        return [math.tanh(self.score_scale * values[-1]) for values in steps]

    async def score_steps(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Unbounded score of every step of each request."""
        await asyncio.gather(*(self._read(request) for request in requests))
        return [[noise(step) for step in request.steps] for request in requests]

    async def stats(self) -> dict[str, float]:
        """Requests, and the share of slots in use while any was."""
        batch = self._batch
        batch.settle()
        return {"requests": self._requests, "occupancy": batch.occupancy, "busy_s": batch.busy_s}

    async def _read(self, request: ScoreRequest) -> None:
        self._requests += 1
        if not self._batch.instant:
            ids = request.prompt_ids + tuple(token for step in request.steps for token in step)
            cached, _ = self._cache.read(ids)
            await self._batch.run(len(ids) - cached, [1])


def noise(step: tuple[int, ...]) -> float:
    """A fixed number in [-2, 2) of a step's tokens."""
    return zlib.crc32(array("i", step).tobytes()) / 2**30 - 2.0
