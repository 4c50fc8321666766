"""The PPM engine with real vLLM on tiny random models, held against transformers, in both score forms."""

import math
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from evolve.policy.checkpoint import DigestMismatch, digest
from evolve.reward.ppm import PPMEngine, PrefixTooLong
from evolve.schema import EngineConfig, Precision, ScoreForm
from evolve.types import ScoreRequest

CONFIG = EngineConfig(precision=Precision.fp32, max_num_seqs=32, max_model_len=256, cpu_kv_cache_gib=0.25)
SCALE = 0.05
HEAD_TOLERANCE = 1e-4
LOGPROB_TOLERANCE = 5e-4
"""Natural-log units, summed over the tokens of a step; fp32 on both sides."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


def make_requests(seed: int, siblings: int = 4) -> list[ScoreRequest]:
    """Siblings that share a prompt, a step with inserted tokens, and half of their own last step."""
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(250) for _ in range(count))

    prompt, first, alike = ids(50), ids(20), ids(40)
    mask = (True,) * 15 + (False,) * 5
    lasts = [alike + ids(3 + i) for i in range(siblings)]
    return [ScoreRequest(prompt, (first, last), (mask, (True,) * len(last))) for last in lasts]


def whole(request: ScoreRequest, steps: int) -> list[int]:
    return [*request.prompt_ids, *(token for step in request.steps[:steps] for token in step)]


@torch.no_grad()
def expected_logprobs(path: str, request: ScoreRequest) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = whole(request, len(request.steps))
    table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    scores, position = [], len(request.prompt_ids)
    for step, sampled in zip(request.steps, request.sampled, strict=True):
        picked = [table[position + i - 1, token].item() for i, token in enumerate(step) if sampled[i]]
        scores.append(math.fsum(picked))
        position += len(step)
    return scores


@torch.no_grad()
def expected_heads(path: str, request: ScoreRequest) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    lengths = range(1, len(request.steps) + 1)
    return [model(torch.tensor([whole(request, count)])).logits.item() for count in lengths]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, build_tiny_model: Callable[..., str]) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("head")
    return tuple(build_tiny_model(root / str(seed), seed, classifier=True) for seed in (0, 1))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory, build_tiny_model: Callable[..., str]) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("logprob")
    return tuple(build_tiny_model(root / str(seed), seed) for seed in (0, 1))  # type: ignore[return-value]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def head(heads: tuple[str, str]) -> AsyncIterator[PPMEngine]:
    engine = PPMEngine(heads[0], ScoreForm.head, SCALE, CONFIG, digest(heads[0]))
    await engine.start()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def logprob(language_models: tuple[str, str]) -> AsyncIterator[PPMEngine]:
    engine = PPMEngine(language_models[0], ScoreForm.logprob, SCALE, CONFIG, digest(language_models[0]))
    await engine.start()
    yield engine
    await engine.close()


async def test_head_scores_are_those_of_transformers(head: PPMEngine, heads: tuple[str, str]) -> None:
    requests = make_requests(1)
    for request, scores in zip(requests, await head.score_steps(requests), strict=True):
        assert scores == pytest.approx(expected_heads(heads[0], request), abs=HEAD_TOLERANCE)


async def test_head_value_is_the_tanh_of_the_last_steps_score(head: PPMEngine) -> None:
    requests = make_requests(2)
    raw = await head.score_steps(requests)
    values = await head.score(requests)
    assert values == pytest.approx([math.tanh(SCALE * scores[-1]) for scores in raw], abs=1e-9)
    assert all(-1 < value < 1 for value in values)


async def test_logprob_scores_are_those_of_transformers(logprob: PPMEngine, language_models: tuple[str, str]) -> None:
    requests = make_requests(3)
    for request, scores in zip(requests, await logprob.score_steps(requests), strict=True):
        assert scores == pytest.approx(expected_logprobs(language_models[0], request), abs=LOGPROB_TOLERANCE)


async def test_a_growing_path_gets_the_scores_of_a_path_scored_at_once(
    logprob: PPMEngine, language_models: tuple[str, str]
) -> None:
    # The second call reads the prefix cache, and siblings that begin alike reach too far into it.
    requests = make_requests(4, siblings=6)
    parent = ScoreRequest(requests[0].prompt_ids, requests[0].steps[:1], requests[0].sampled[:1])
    await logprob.score([parent])
    rescored = (await logprob.stats())["rescored"]
    for request in requests:
        [scores] = await logprob.score_steps([request])
        assert scores == pytest.approx(expected_logprobs(language_models[0], request), abs=LOGPROB_TOLERANCE)
    assert (await logprob.stats())["rescored"] > rescored


async def test_logprob_value_is_the_tanh_of_the_summed_steps(logprob: PPMEngine) -> None:
    requests = make_requests(5)
    raw = await logprob.score_steps(requests)
    values = await logprob.score(requests)
    assert values == pytest.approx([math.tanh(SCALE * sum(scores)) for scores in raw], abs=1e-9)
    root = ScoreRequest(requests[0].prompt_ids, (), ())
    assert await logprob.score([root]) == [0.0]


@pytest.mark.parametrize("form", ["head", "logprob"])
async def test_siblings_scored_together_score_as_alone(form: str, request: pytest.FixtureRequest) -> None:
    engine: PPMEngine = request.getfixturevalue(form)
    siblings = make_requests(6)
    together = await engine.score(siblings)
    engine._kept.clear()
    alone = [(await engine.score([sibling]))[0] for sibling in siblings]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("form", ["head", "logprob"])
async def test_an_over_long_prefix_is_refused_and_the_longest_is_scored(
    form: str, request: pytest.FixtureRequest
) -> None:
    engine: PPMEngine = request.getfixturevalue(form)
    last = CONFIG.max_model_len - 10
    fits = ScoreRequest((1,) * 10, ((2,) * last,), ((True,) * last,))
    too_long = ScoreRequest((1,) * 11, ((2,) * last,), ((True,) * last,))
    before = (await engine.stats())["refused"]
    assert len(await engine.score([fits])) == 1
    with pytest.raises(PrefixTooLong, match="257 tokens, but at most 256"):
        await engine.score([fits, too_long])
    assert (await engine.stats())["refused"] == before + 1


@pytest.mark.parametrize("form", ["head", "logprob"])
async def test_reload_changes_the_scores_to_the_new_models(
    form: str, request: pytest.FixtureRequest, heads: tuple[str, str], language_models: tuple[str, str]
) -> None:
    engine: PPMEngine = request.getfixturevalue(form)
    first, second = heads if form == "head" else language_models
    [sample] = make_requests(7, siblings=1)
    await engine.score_steps([sample])
    with pytest.raises(DigestMismatch):
        await engine.reload(second, digest(first))
    assert await engine.reload(second, digest(second)) == digest(second) == await engine.health()
    expected = (expected_heads if form == "head" else expected_logprobs)(second, sample)
    assert (await engine.score_steps([sample]))[0] == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    await engine.reload(first, digest(first))


async def test_a_broken_checkpoint_is_an_error_not_a_score(
    head: PPMEngine, heads: tuple[str, str], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(heads[0])
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    await head.reload(str(tmp_path))
    with pytest.raises(RuntimeError, match="a score is nan"):
        await head.score(make_requests(8))
    await head.reload(heads[0])
