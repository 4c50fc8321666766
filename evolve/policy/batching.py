"""The timing of an LLM engine with continuous batching, without the engine.

What is modelled: a fixed number of slots, each holding one sequence from its admission to its last token; sequences
are admitted first come, first served, whenever a slot is free; one decoding iteration gives every running sequence
one token and takes longer the more of them run; reading a prompt stalls decoding for as long as its uncached tokens
take; and a prefix cache of whole blocks, the least recently used of which are dropped.

What is not: memory pressure (no sequence is ever preempted), the growth of an iteration with the length of the
contexts, prefills that share an iteration with decoding (the time is the same, its order is not), start-up, and any
cost of scheduling on the host.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens of a block of the prefix cache (vLLM's on GPUs)."""
TIMELINE = 4096
"""Points of the record of busy slots; when it is full every second one is dropped."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast an engine is. The defaults are a 7B model in bf16 on one A100 with 80 GB.

    Decoding reads all weights once an iteration: 15.2 GB at about 1.6 of 2.0 TB/s, and 6.5 ms of launching and
    sampling, make 16 ms; every sequence adds its KV cache (57 kB a token with grouped-query attention, 700 tokens) and
    its share of sampling, 0.06 ms. Reading a prompt is bound by arithmetic: 2 x 7.6e9 FLOPs a token at 0.4 of
    312 TFLOP/s. The cache is what 80 GB leave beside the weights.
    """

    iteration_s: float = 0.016
    """One decoding iteration, whatever runs."""
    sequence_s: float = 0.00006
    """What each running sequence adds to it."""
    prefill_tokens_per_s: float = 8200.0
    cache_tokens: int = 900_000


@dataclass(slots=True)
class _Request:
    arrived: float
    prefill_s: float
    lengths: deque[int]
    """Tokens of its sequences that have no slot yet."""
    unfinished: int
    done: asyncio.Future[None]


@dataclass(slots=True)
class ContinuousBatch:
    """The clock of one engine; belongs to one event loop.

    Time is the model's: seconds of the loop times `speed`. A loop that is late delays answers, not the model: what
    should have ended meanwhile has ended when it should.
    """

    rates: Rates
    slots: int
    speed: float = 1.0
    busy_slot_s: float = 0.0
    """Integral of running sequences over time."""
    busy_s: float = 0.0
    """Time with any sequence running."""
    running: int = 0
    timeline: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])
    """(time, `busy_slot_s` until then), in order; enough points to interpolate between."""
    _waiting: deque[_Request] = field(default_factory=deque)
    _ends: list[tuple[float, int, _Request]] = field(default_factory=list)
    _clock: float = 0.0
    _iterations: float = 0.0
    _resolution: float = 0.02
    _origin: float = math.nan
    _alarm: asyncio.TimerHandle | None = None
    _order: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def instant(self) -> bool:
        """Whether everything takes no time at all; then nothing is recorded either."""
        return math.isinf(self.speed)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return sum(len(request.lengths) for request in self._waiting)

    @property
    def occupancy(self) -> float:
        """Mean share of the slots in use while any was."""
        return self.busy_slot_s / self.busy_s / self.slots if self.busy_s else 0.0

    async def run(self, uncached: int, lengths: Sequence[int]) -> None:
        """Return when a prompt of which `uncached` tokens must be read has been continued by sequences of `lengths`."""
        if self.instant or not lengths:
            return
        loop = asyncio.get_running_loop()
        if math.isnan(self._origin):
            self._origin = loop.time()
        now = self.now()
        prefill_s = uncached / self.rates.prefill_tokens_per_s
        request = _Request(now, prefill_s, deque(lengths), len(lengths), loop.create_future())
        self._waiting.append(request)
        self._turn()
        await request.done

    def now(self) -> float:
        """Model time, seconds; 0 before the first request."""
        if math.isnan(self._origin):
            return 0.0
        return (asyncio.get_running_loop().time() - self._origin) * self.speed

    def settle(self) -> None:
        """Bring the record up to the present."""
        if not math.isnan(self._origin):
            self._advance(self.now())

    # ------------------------------------------------------------------ inside

    def _turn(self) -> None:
        """Do what is due, and wake again when the next sequence ends."""
        self._advance(self.now())
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = min(self._next_end(), self._next_admission())
        if due < math.inf:
            self._alarm = asyncio.get_running_loop().call_at(self._origin + due / self.speed, self._turn)

    def _advance(self, now: float) -> None:
        while True:
            end, admission = self._next_end(), self._next_admission()
            due = min(end, admission)
            self._pass(min(due, now))
            if due > now:
                return
            if end <= admission:
                self._end_one()
            else:
                self._admit_one()

    def _step_s(self) -> float:
        return self.rates.iteration_s + self.running * self.rates.sequence_s

    def _next_end(self) -> float:
        if not self._ends:
            return math.inf
        return self._clock + max(0.0, self._ends[0][0] - self._iterations) * self._step_s()

    def _next_admission(self) -> float:
        if not self._waiting or self.running >= self.slots:
            return math.inf
        return max(self._clock, self._waiting[0].arrived)

    def _pass(self, until: float) -> None:
        """Let running sequences decode until then."""
        span = until - self._clock
        if span > 0:
            if self.running:
                self._iterations += span / self._step_s()
            self._record(span)

    def _record(self, span: float) -> None:
        self._clock += span
        self.busy_slot_s += span * self.running
        self.busy_s += span if self.running else 0.0
        if self._clock - self.timeline[-1][0] >= self._resolution:
            self.timeline.append((self._clock, self.busy_slot_s))
            if len(self.timeline) > TIMELINE:
                del self.timeline[1::2]
                self._resolution *= 2

    def _admit_one(self) -> None:
        request = self._waiting[0]
        length = request.lengths.popleft()
        self.running += 1
        if request.prefill_s:  # the first of its sequences: the others find its prompt in the cache
            self._record(request.prefill_s)
            request.prefill_s = 0.0
        heapq.heappush(self._ends, (self._iterations + length, next(self._order), request))
        if not request.lengths:
            self._waiting.popleft()

    def _end_one(self) -> None:
        _, _, request = heapq.heappop(self._ends)
        self.running -= 1
        request.unfinished -= 1
        if not request.unfinished and not request.done.done():
            request.done.set_result(None)


class PrefixCache:
    """Which blocks of tokens were read before, by what they are and what precedes them."""

    def __init__(self, tokens: int) -> None:
        self._capacity = max(1, tokens // BLOCK)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def read(self, ids: tuple[int, ...]) -> tuple[int, int]:
        """Enter a prompt; returns how many of its tokens were cached, and its key for `extend`."""
        key = hits = 0
        whole = len(ids) // BLOCK
        hit = True
        for block in range(whole):
            key = hash((key, ids[block * BLOCK : (block + 1) * BLOCK]))
            hit = self._enter(key) and hit
            hits += hit
        # The last token is always computed: its logits are what sampling begins with.
        return min(hits * BLOCK, len(ids) - 1), key

    def extend(self, key: int, ids: tuple[int, ...], more: tuple[int, ...]) -> None:
        """Enter what was generated after the prompt `ids` with that key."""
        rest = ids[len(ids) // BLOCK * BLOCK :] + more
        for block in range(len(rest) // BLOCK):
            key = hash((key, rest[block * BLOCK : (block + 1) * BLOCK]))
            self._enter(key)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()

    def _enter(self, key: int) -> bool:
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return True
        self._blocks[key] = None
        if len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return False
