"""The simulated engine: its timing by hand, its content, and that one does not depend on the other."""

import asyncio
import re

import pytest

from evolve.policy.batching import BLOCK, ContinuousBatch, PrefixCache, Rates
from evolve.policy.formats import format_named
from evolve.policy.simulated import HARD, SimulatedPolicy, continuations, decode, encode, sum_problems
from evolve.schema import EngineConfig
from evolve.types import Invalid, Sampling, Step

RATES = Rates(iteration_s=0.01, sequence_s=0.001, prefill_tokens_per_s=1000.0)
PRINTED = format_named("printed")


def busy_after(slots: int, requests: list[tuple[int, list[int]]]) -> ContinuousBatch:
    """Requests (uncached tokens, lengths) that all come at once."""
    batch = ContinuousBatch(RATES, slots, speed=20.0)

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*(batch.run(*request) for request in requests)), 30)

    asyncio.run(run())
    return batch


def test_one_sequence_takes_its_prompt_and_one_iteration_a_token() -> None:
    batch = busy_after(4, [(100, [10])])
    assert batch.busy_s == pytest.approx(0.1 + 10 * 0.011)
    assert batch.busy_slot_s == pytest.approx(batch.busy_s)


def test_iterations_are_longer_the_more_sequences_run() -> None:
    batch = busy_after(4, [(0, [10, 20])])
    # 10 iterations of two, then 10 of one
    assert batch.busy_s == pytest.approx(10 * 0.012 + 10 * 0.011)
    assert batch.busy_slot_s == pytest.approx(2 * 10 * 0.012 + 10 * 0.011)


def test_a_sequence_without_a_slot_waits_for_one() -> None:
    batch = busy_after(1, [(0, [10, 10, 5])])
    assert batch.busy_s == pytest.approx(25 * 0.011)


def test_a_prompt_that_is_read_stalls_the_others() -> None:
    # The second arrives within the first's reading, up to the moments between the two calls.
    batch = busy_after(4, [(50, [10]), (50, [10])])
    assert batch.busy_s == pytest.approx(0.1 + 10 * 0.012, abs=0.02)


def test_the_record_of_busy_slots_is_bounded_and_ends_at_the_total() -> None:
    batch = ContinuousBatch(RATES, 2, speed=1e6)

    async def run() -> None:
        for _ in range(300):
            await batch.run(0, [4000, 8000])
        batch.settle()

    asyncio.run(run())
    assert len(batch.timeline) <= 4097
    times = [at for at, _ in batch.timeline]
    assert times == sorted(times)
    assert batch.timeline[-1][1] <= batch.busy_slot_s


def test_a_prefix_is_cached_in_whole_blocks_and_never_to_its_last_token() -> None:
    cache = PrefixCache(10 * BLOCK)
    prompt = tuple(range(2 * BLOCK + 5))
    assert cache.read(prompt)[0] == 0
    cached, key = cache.read(prompt)
    assert cached == 2 * BLOCK
    cache.extend(key, prompt, tuple(range(100, 100 + BLOCK)))
    assert cache.read(prompt + tuple(range(100, 100 + BLOCK)))[0] == 3 * BLOCK
    assert cache.read(prompt[: 2 * BLOCK])[0] == 2 * BLOCK - 1
    assert cache.read((7, *prompt[1:]))[0] == 0


def test_the_least_recently_used_blocks_are_dropped() -> None:
    cache = PrefixCache(2 * BLOCK)
    first, second = tuple(range(2 * BLOCK)), tuple(range(50, 50 + 2 * BLOCK))
    cache.read(first)
    cache.read(second)
    assert cache.read(first)[0] == 0


def test_ids_spell_the_text_and_the_printed_format_parses_it() -> None:
    [problem] = sum_problems(1, 3)
    prompt = PRINTED.prompt(problem.question)
    assert decode(encode(prompt)) == prompt
    found = continuations(encode(prompt), 64, 200, 5)
    assert all(decode(c.token_ids) == c.text and len(c.logprobs) == len(c.token_ids) for c in found)
    parsed = [PRINTED.parse(c.text, False) for c in found if not c.truncated]
    assert all(isinstance(step, Step) for step in parsed)


def test_right_steps_lead_to_the_gold_answer() -> None:
    for problem in sum_problems(40, 9):
        ids = encode(PRINTED.prompt(problem.question))
        terms = [int(term) for term in problem.question.partition(": ")[2].rstrip(".").split(", ")]
        codes: list[str] = []
        while True:
            steps = [PRINTED.parse(c.text, False) for c in continuations(ids, 40, 200, 1)]
            right = rf"\b{terms[len(codes)]}[\])]*$" if len(codes) < len(terms) else r"print\(total\)$"
            step = next(s for s in steps if isinstance(s, Step) and re.search(right, s.code))
            codes.append(step.code)
            ids += encode(step.text)
            if step.final:
                break
        printed: list[str] = []
        exec("\n".join(codes), {"print": lambda value, into=printed: into.append(str(value))})
        assert printed == list(problem.answers)


def test_hard_numbers_are_misread_more_often() -> None:
    def wrong(term: int) -> int:
        prefix = encode(PRINTED.prompt(f"Problem 1. Add up: {term}, 3."))
        parsed = [PRINTED.parse(c.text, False) for c in continuations(prefix, 400, 200, 2)]
        return sum(isinstance(p, Step) and f"{term}" not in p.code for p in parsed)

    assert wrong(HARD + 5) > 4 * wrong(HARD - 5)


def test_content_depends_on_prefix_and_seed_and_not_on_time_order_or_load() -> None:
    prefixes = [encode(PRINTED.prompt(problem.question)) for problem in sum_problems(6, 1)]
    sampling = Sampling(max_tokens=160, stop=PRINTED.stop, seed=7)

    async def ask(speed: float, slots: int, order: list[int]) -> dict[int, list[str]]:
        engine = SimulatedPolicy("any", EngineConfig(max_num_seqs=slots), speed=speed)
        answers = await asyncio.gather(*(engine.propose([prefixes[i]], 4, sampling) for i in order))
        return {i: [c.text for c in found] for i, [found] in zip(order, answers, strict=True)}

    one = asyncio.run(ask(float("inf"), 256, [0, 1, 2, 3, 4, 5]))
    two = asyncio.run(ask(500.0, 3, [5, 2, 4, 0, 1, 3]))
    assert one == two
    assert len({tuple(texts) for texts in one.values()}) == len(prefixes)
    sampling = Sampling(max_tokens=160, stop=PRINTED.stop, seed=8)
    assert asyncio.run(ask(float("inf"), 256, [0])) != {0: one[0]}


def test_prefixes_without_room_are_refused_and_long_steps_are_cut_off() -> None:
    engine = SimulatedPolicy("any", EngineConfig(max_model_len=200), speed=float("inf"))

    async def ask(prefix: tuple[int, ...], limit: int) -> list:
        return (await engine.propose([prefix], 50, Sampling(max_tokens=limit, stop=PRINTED.stop)))[0]

    prefix = encode(PRINTED.prompt(sum_problems(1, 1)[0].question))
    assert asyncio.run(ask((*prefix, *range(1, 160)), 60)) == []
    cut = [c for c in asyncio.run(ask(prefix, 20)) if c.truncated]
    assert cut
    assert all(len(c.token_ids) <= 20 for c in cut)
    assert all(isinstance(PRINTED.parse(c.text, False), Invalid) for c in cut)
    assert asyncio.run(engine.stats())["refused"] == 1


def test_the_mean_length_of_steps_is_realistic() -> None:
    prefix = encode(PRINTED.prompt(sum_problems(1, 1)[0].question))
    lengths = sorted(len(c.token_ids) for c in continuations(prefix, 2000, 400, 3))
    assert 40 < lengths[1000] < 62
    assert lengths[-20] > 2 * lengths[1000]
