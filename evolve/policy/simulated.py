"""A simulated policy engine: real steps of a made-up task at the pace of a real model, for tests and benchmarks.

It stands where `PolicyEngine` stands, with the same methods and statistics, so that shards, services and verifiers
around it are the real ones. Timing is `evolve.policy.batching`'s, whose docstring says what is modelled and what not.

What it writes is a task of its own: adding up the numbers of a question, one a step, in the `printed` format, with
steps of realistic length (log-normal, about 55 tokens), wrong numbers, code that raises and samples that are cut off.
The content depends on prefix and seed alone: not on time, order, load, the checkpoint or the temperature. It says
nothing about what any model can do, and a search over it nothing about how well search works.
"""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from array import array
from collections.abc import Sequence
from random import Random

from evolve.policy.batching import ContinuousBatch, PrefixCache, Rates
from evolve.policy.engine import Request
from evolve.policy.formats import END_OF_CODE, END_OF_STEP, MARKERS
from evolve.policy.standin import StandIn
from evolve.schema import EngineConfig
from evolve.types import Candidate, Problem, Sampling

SPECIAL = 1 << 24
"""Ids from here on are the format's markers, one each; an id below is the number its 1 to 3 bytes spell."""
_MARKER_IDS = {marker: SPECIAL + place for place, marker in enumerate(MARKERS)}
_SPLIT = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")
_END_OF_STEP_ID = _MARKER_IDS[END_OF_STEP]

HARD = 50
"""Numbers from here on are misread as often as not; smaller ones seldom."""
MISREAD, MISREAD_HARD, BROKEN, CUT_OFF = 0.05, 0.5, 0.06, 0.01
"""Shares of steps: with a wrong small number, a wrong hard one, code that raises, no end within the limit."""
STYLES: tuple[tuple[int, str, str, str], ...] = (
    (40, "", "total = {0}", "total = total + {0}"),
    (30, "", "total = sum([{0}])", "total = sum([total, {0}])"),
    (20, "from fractions import Fraction\n", "total = Fraction({0})", "total = total + Fraction({0})"),
    (10, "from sympy import Integer\n", "total = Integer({0})", "total = total + Integer({0})"),
)
"""How a problem's steps are written: per cent of problems, what the first step imports, the first step, the others.

For a sandbox these are four different costs: plain arithmetic, Python that needs a process, and two libraries."""
MEDIAN_TOKENS, SPREAD = 50.0, 0.5
"""Of the log-normal length of a step."""
_PROSE = (
    "we take the next number of the list and add it to what we have so far, which keeps the running sum right after "
    "every single step; since addition does not mind the order, nothing has to be kept but the total, and we can check "
    "it at any time by adding the numbers that were used up to here once more from the start, as one would on paper "
) * 4
_LOGPROBS = tuple(-2.0 * Random(place).random() ** 3 for place in range(4096))


def sum_problems(count: int, seed: int, shortest: int = 3, longest: int = 8) -> list[Problem]:
    """Problems that `SimulatedPolicy` has the steps for; longer ones and those with numbers from 50 on are harder."""
    made = []
    for number in range(count):
        rng = Random(f"{seed}:{number}")
        hard = rng.random() * 0.6
        terms = [
            rng.randint(HARD, 99) if rng.random() < hard else rng.randint(2, HARD - 1)
            for _ in range(rng.randint(shortest, longest))
        ]
        question = f"Problem {number}. Add up: {', '.join(map(str, terms))}."
        made.append(Problem(f"sum-{seed}-{number:06}", question, (str(sum(terms)),), difficulty=len(terms)))
    return made


def encode(text: str) -> tuple[int, ...]:
    """Token ids: one for a marker, one for every three bytes of other text."""
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        if piece in _MARKER_IDS:
            ids.append(_MARKER_IDS[piece])
        else:
            raw = piece.encode()
            ids += [int.from_bytes(raw[i : i + 3], "big") for i in range(0, len(raw), 3)]
    return tuple(ids)


def decode(ids: Sequence[int]) -> str:
    """The text of token ids."""
    raw = b"".join(
        MARKERS[i - SPECIAL].encode() if i >= SPECIAL else i.to_bytes((i.bit_length() + 7) // 8, "big") for i in ids
    )
    return raw.decode(errors="replace")


class SimulatedPolicy(StandIn):
    """A `Policy` that takes as long as a real engine would; made and called like `PolicyEngine`."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        digest: str | None = None,
        device: str = "cpu",
        *,
        rates: Rates = Rates(),  # noqa: B008 (frozen)
        speed: float = 1.0,
    ) -> None:
        """
        Args:
            model: any name; there are no weights.
            config: `max_num_seqs` is the number of slots, `max_model_len` the longest sequence.
            digest: what to serve as; None: the model's name.
            device: not used.
            rates: how fast the engine is.
            speed: model seconds a second; inf answers at once (and then keeps no prefix cache).
        """
        if not speed > 0:
            raise ValueError(f"speed={speed}: a simulated engine needs a speed above 0")
        super().__init__(model, digest)
        self.config = config
        self._batch = ContinuousBatch(rates, config.max_num_seqs, speed)
        self._cache = PrefixCache(rates.cache_tokens)
        self._counts: dict[str, float] = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "refused", "reloads"), 0.0
        )

    async def reload(self, path: str, digest: str | None = None) -> str:
        """As `StandIn.reload`; the prefix cache is emptied."""
        self._cache.clear()
        self._counts["reloads"] += 1
        return await super().reload(path, digest)

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        """`n` continuations of each prefix, in the prefixes' order; an empty list for one that is too long."""
        first = sampling.seed or 0
        if len(prefixes) == 1:
            return [await self._sample(tuple(prefixes[0]), n, sampling, first)]
        work = (self._sample(tuple(prefix), n, sampling, first + place * n) for place, prefix in enumerate(prefixes))
        return list(await asyncio.gather(*work))

    async def propose_many(self, requests: Sequence[Request]) -> list[list[Candidate]]:
        """The candidates of each (prefix, n, sampling), in the requests' order."""
        work = (self._sample(prefix, n, sampling, sampling.seed or 0) for prefix, n, sampling in requests)
        return list(await asyncio.gather(*work))

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts."""
        return [encode(text) for text in texts]

    async def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token id sequences."""
        return [decode(ids) for ids in sequences]

    async def stats(self) -> dict[str, float]:
        """As `PolicyEngine.stats`, times in model seconds; and `busy_slot_s`, `cached_tokens`."""
        batch = self._batch
        batch.settle()
        return self._counts | {
            "running": batch.running,
            "waiting": batch.waiting,
            "occupancy": batch.occupancy,
            "busy_s": batch.busy_s,
            "ready_s": 0.0,
            "busy_slot_s": batch.busy_slot_s,
        }

    async def timeline(self) -> list[tuple[float, float]]:
        """(model seconds since the first request, busy slot-seconds until then), in order."""
        self._batch.settle()
        return [*self._batch.timeline, (self._batch.now(), self._batch.busy_slot_s)]

    # ------------------------------------------------------------------ inside

    async def _sample(self, prefix: tuple[int, ...], n: int, sampling: Sampling, seed: int) -> list[Candidate]:
        if len(prefix) + sampling.max_tokens > self.config.max_model_len:
            self._counts["refused"] += 1
            return []
        candidates = continuations(prefix, n, sampling.max_tokens, seed)
        lengths = [len(candidate.token_ids) for candidate in candidates]
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(prefix)
        self._counts["generated_tokens"] += sum(lengths)
        if not self._batch.instant:
            cached, key = self._cache.read(prefix)
            self._counts["cached_tokens"] += cached
            await self._batch.run(len(prefix) - cached, lengths)
            for candidate in candidates:
                self._cache.extend(key, prefix, candidate.token_ids)
        return candidates


def continuations(prefix: tuple[int, ...], n: int, max_tokens: int, seed: int) -> list[Candidate]:
    """`n` next steps after a prefix, from prefix and seed alone."""
    rng = Random(seed << 32 | zlib.crc32(array("i", prefix).tobytes()))
    question = decode(prefix[:64]).partition("\n")[0]
    terms = [int(term) for term in re.findall(r"\d+", question.partition(":")[2])]
    step = prefix.count(_END_OF_STEP_ID)
    style = _style(question)
    return [_candidate(rng, terms, style, step, max_tokens) for _ in range(n)]


def _style(question: str) -> tuple[str, str, str]:
    """(import, first step, other steps) of a question's solutions."""
    place = zlib.crc32(question.encode()) % sum(share for share, *_ in STYLES)
    for share, *style in STYLES:
        if place < share:
            return style[0], style[1], style[2]
        place -= share
    raise AssertionError("the shares of STYLES cover every place")


def _candidate(rng: Random, terms: Sequence[int], style: tuple[str, str, str], step: int, max_tokens: int) -> Candidate:
    boundary = END_OF_STEP
    if step >= len(terms):
        code, boundary = "print(total)", END_OF_CODE
    else:
        term = terms[step]
        if rng.random() < (MISREAD_HARD if term >= HARD else MISREAD):
            term += rng.choice((-10, -1, 1, 10))
        code = style[2].format(term) if step else style[0] + style[1].format(term)
    if rng.random() < BROKEN:
        code = f"{code} + rest"
    head = f"# Step {step + 1}: "
    tokens = round(rng.lognormvariate(math.log(MEDIAN_TOKENS), SPREAD))
    wanted = 3 * min(tokens, max_tokens - 4) - len(head) - len(code) - 2
    start = rng.randrange(len(_PROSE) // 2)
    text = f"{head}{_PROSE[start : start + max(wanted, 12)]}\n{code}\n{boundary}"
    cut_off = rng.random() < CUT_OFF
    if cut_off:
        text = text.removesuffix(boundary)
    ids = encode(text)
    if len(ids) > max_tokens:
        cut_off, ids = True, ids[:max_tokens]
        text = decode(ids)
    offset = rng.randrange(len(_LOGPROBS) // 2)
    return Candidate(text, ids, _LOGPROBS[offset : offset + len(ids)], truncated=cut_off)
