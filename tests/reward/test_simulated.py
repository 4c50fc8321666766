"""The simulated PPM: scores in range, of the last step's tokens alone, as quick as its cache allows."""

import asyncio

from evolve.reward.simulated import SimulatedPPM
from evolve.schema import EngineConfig, ScoreForm
from evolve.types import ScoreRequest


def request(prompt: tuple[int, ...], *steps: tuple[int, ...]) -> ScoreRequest:
    return ScoreRequest(prompt, steps, tuple((True,) * len(step) for step in steps))


def ppm(speed: float) -> SimulatedPPM:
    return SimulatedPPM("any", ScoreForm.head, 1.0, EngineConfig(), speed=speed)


def test_scores_lie_in_range_and_depend_on_the_last_step() -> None:
    requests = [request((1, 2), (3,), (place,)) for place in range(200)]
    scores = asyncio.run(ppm(float("inf")).score(requests))
    assert all(-1 < score < 1 for score in scores)
    assert len(set(scores)) == 200
    assert asyncio.run(ppm(1000.0).score([request((9,), (5,))])) == [scores[5]]


def test_siblings_cost_only_their_last_steps_once_the_prefix_is_read() -> None:
    prompt = tuple(range(4000))

    async def run() -> tuple[float, float]:
        engine = ppm(100.0)
        await engine.score([request(prompt, (1,))])
        first = (await engine.stats())["busy_s"]
        await engine.score([request(prompt, (2,)), request(prompt, (3,))])
        return first, (await engine.stats())["busy_s"] - first

    first, siblings = asyncio.run(run())
    assert siblings < first / 3
