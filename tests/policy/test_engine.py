"""The policy engine with real vLLM on a tiny random model, held against transformers."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from evolve.policy.checkpoint import DigestMismatch, digest
from evolve.policy.engine import PolicyEngine
from evolve.policy.serving import EngineNotStarted
from evolve.schema import EngineConfig, Precision
from evolve.types import Candidate, Sampling

CONFIG = EngineConfig(
    precision=Precision.fp32, max_num_seqs=32, max_model_len=256, cpu_kv_cache_gib=0.25, enforce_eager=True
)
STOP = ("<end_of_step>", "<end_of_code>")
PROMPT = "Ann has 3 pears and buys 4 more.\n<code>\n"
SAMPLING = Sampling(max_tokens=24, stop=STOP, seed=7)
LOGPROB_TOLERANCE = 2e-4
"""Natural-log units; fp32 on both sides, kernels that sum in another order."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, build_tiny_model: Callable[..., str]) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("policy")
    return build_tiny_model(root / "a", 0), build_tiny_model(root / "b", 1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoints: tuple[str, str]) -> AsyncIterator[PolicyEngine]:
    engine = PolicyEngine(checkpoints[0], CONFIG, digest(checkpoints[0]))
    assert await engine.start() == digest(checkpoints[0])
    yield engine
    await engine.close()
    with pytest.raises(EngineNotStarted):
        await engine.health()


async def prefix_of(engine: PolicyEngine, text: str = PROMPT) -> tuple[int, ...]:
    return (await engine.encode([text]))[0]


def transformers_logprobs(path: str, prefix: tuple[int, ...], continuation: tuple[int, ...]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([[*prefix, *continuation]])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    return [table[len(prefix) + i - 1, token].item() for i, token in enumerate(continuation)]


async def test_candidates_decode_to_their_text_and_end_at_a_boundary_or_the_limit(engine: PolicyEngine) -> None:
    [candidates] = await engine.propose([await prefix_of(engine)], 24, replace(SAMPLING, max_tokens=100))
    ended = [c for c in candidates if c.text.endswith(STOP)]
    assert ended
    for candidate in candidates:
        assert (await engine.decode([candidate.token_ids]))[0] == candidate.text
        assert len(candidate.token_ids) == len(candidate.logprobs)
        assert "<eos>" not in candidate.text
        assert candidate.truncated == (len(candidate.token_ids) == 100 and candidate not in ended)
        assert sum(candidate.text.count(boundary) for boundary in STOP) == (candidate in ended)


async def test_logprobs_are_those_of_transformers_at_temperature_one(
    engine: PolicyEngine, checkpoints: tuple[str, str]
) -> None:
    prefix = await prefix_of(engine)
    sampling = replace(SAMPLING, temperature=0.7, top_p=0.9)
    [candidates] = await engine.propose([prefix], 4, sampling)
    for candidate in candidates:
        expected = transformers_logprobs(checkpoints[0], prefix, candidate.token_ids)
        assert candidate.logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


async def test_the_same_seed_gives_the_same_tokens_and_no_two_samples_share_one(engine: PolicyEngine) -> None:
    prefix = await prefix_of(engine)
    first = await engine.propose([prefix, prefix], 4, SAMPLING)
    again = await engine.propose([prefix, prefix], 4, SAMPLING)
    other = await engine.propose([prefix, prefix], 4, replace(SAMPLING, seed=99))

    def ids(groups: list[list[Candidate]]) -> list[tuple[int, ...]]:
        return [candidate.token_ids for group in groups for candidate in group]

    assert ids(first) == ids(again)
    assert len(set(ids(first))) == 8
    assert not set(ids(first)) & set(ids(other))


async def test_a_batch_of_requests_is_answered_in_order(engine: PolicyEngine) -> None:
    texts = [f"Question {i}\n" for i in range(6)]
    greedy = Sampling(temperature=0.0, max_tokens=6, stop=STOP)
    prefixes = await engine.encode(texts)
    together = await engine.propose_many([(p, 1 + i % 2, greedy) for i, p in enumerate(prefixes)])
    assert [len(group) for group in together] == [1, 2, 1, 2, 1, 2]
    for prefix, group in zip(prefixes, together, strict=True):
        [[alone]] = await engine.propose([prefix], 1, greedy)
        assert all(candidate.token_ids == alone.token_ids for candidate in group)


async def test_a_prefix_without_room_is_refused_and_counted_never_cut(engine: PolicyEngine) -> None:
    before = (await engine.stats())["refused"]
    room = CONFIG.max_model_len - SAMPLING.max_tokens
    fits, too_long = (1,) * room, (1,) * (room + 1)
    first, second = await engine.propose([fits, too_long], 1, SAMPLING)
    assert (len(first), second) == (1, [])
    assert (await engine.stats())["refused"] == before + 1


async def test_text_round_trips_through_the_tokenizer_without_special_tokens(engine: PolicyEngine) -> None:
    texts = [PROMPT, "é\n", "a = 1\n<end_of_step>"]
    ids = await engine.encode(texts)
    assert await engine.decode(ids) == texts
    assert len((await engine.encode(["<end_of_step>"]))[0]) == 1
    assert await engine.encode([]) == []


async def test_many_seeded_prompts_at_once_do_not_kill_the_engine(engine: PolicyEngine) -> None:
    # vLLM 0.32 dies on a CPU when it divides the prefill of a seeded request.
    requests = [((i % 250,) * 200, 1, replace(SAMPLING, max_tokens=2, seed=i)) for i in range(64)]
    assert all(await engine.propose_many(requests))
    assert await engine.health() == engine.digest
    stats = await engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert 0 < stats["occupancy"] <= 1
    assert stats["prompt_tokens"] >= 64 * 200


async def test_reload_swaps_the_weights_and_checks_their_digest(
    engine: PolicyEngine, checkpoints: tuple[str, str], tmp_path: Path, build_tiny_model: Callable[..., str]
) -> None:
    first, second = checkpoints
    prefix = await prefix_of(engine)
    [before] = await engine.propose([prefix], 2, SAMPLING)
    with pytest.raises(DigestMismatch):
        await engine.reload(second, digest(first))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        await engine.reload(build_tiny_model(tmp_path / "deeper", 0, layers=1))
    assert await engine.health() == digest(first)
    in_flight = asyncio.create_task(engine.propose([prefix], 2, SAMPLING))
    await asyncio.sleep(0)
    assert await engine.reload(second, digest(second)) == digest(second)
    assert (await in_flight)[0] == before
    [after] = await engine.propose([prefix], 2, SAMPLING)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    for candidate in after:
        expected = transformers_logprobs(second, prefix, candidate.token_ids)
        assert candidate.logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    await engine.reload(first, digest(first))
    [restored] = await engine.propose([prefix], 2, SAMPLING)
    assert [c.token_ids for c in restored] == [c.token_ids for c in before]
    assert math.isclose((await engine.stats())["reloads"], 2)


async def test_boundaries_of_several_tokens_keep_the_token_that_completes_them(
    tmp_path: Path, build_tiny_model: Callable[..., str]
) -> None:
    engine = PolicyEngine(build_tiny_model(tmp_path / "spelt", 0, single_boundaries=False), CONFIG)
    await engine.start()
    try:
        prefix = await prefix_of(engine)
        merged = (await engine.encode([">\n"]))[0]
        assert len(merged) == 1
        # Strings that a random model does sample stand in for the boundaries.
        probe = Sampling(temperature=0.0, max_tokens=12, stop=("@never@",))
        [[whole]] = await engine.propose([prefix], 1, probe)
        assert whole.truncated
        boundary = whole.text[5:8]
        [[cut]] = await engine.propose([prefix], 1, replace(probe, stop=(boundary,)))
        end = whole.text.index(boundary) + len(boundary)
        assert cut.text == whole.text[: len(cut.text)]
        assert len(cut.text) >= end
        assert not cut.truncated
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert boundary not in (await engine.decode([cut.token_ids[:-1]]))[0]
    finally:
        await engine.close()
