"""Calls to actors, coalesced: what many coroutines ask for in one moment travels in one Ray call.

A Ray call costs about a millisecond of CPU on both sides together; a search makes tens of thousands of requests. So a
client gathers the calls of one turn of its event loop into one `submit`, and fetches whatever has been answered since
with one `collect`, which waits at the actor. Every call still has its own answer, error and deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from evolve.errors import EvolveError
from evolve.types import Candidate, Outcome, Problem, Sampling, ScoreRequest, Verdict

COLLECT_WAIT_S = 10.0
"""How long a `collect` waits at the actor before it returns empty-handed."""
GATHER_S = 0.001
"""How long an answer waits for others to travel with."""


class ServiceError(EvolveError):
    """An actor did not answer in time, or died more often than it may be restarted."""


class ServiceHost:
    """The actor around one service (engine, PPM or verifier): a plain object with async methods.

    `factory` makes the service inside the actor's process. Create with `max_concurrency` high: every waiting
    call occupies one slot.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self._service: Any = None
        self._answers: dict[str, list[tuple[int, bool, Any]]] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()

    async def start(self, expects: tuple[str, str] | None = None) -> None:
        """Make the service and wait until it is ready; a second call does nothing.

        `expects`: the (path, digest) of the checkpoint an engine must serve. An actor that Ray has restarted
        begins with the checkpoint it was first made with, and loads the expected one here.
        """
        async with self._starting:
            if self._service is None:
                service = self._factory()
                if hasattr(service, "start"):
                    await service.start()
                self._service = service
            if expects is not None and self._service.digest != expects[1]:
                await self._service.reload(*expects)

    async def call(self, method: str, *args: Any) -> Any:
        """One call, not coalesced."""
        await self.start()
        return await getattr(self._service, method)(*args)

    async def submit(
        self, client: str, calls: Sequence[tuple[int, str, tuple[Any, ...]]], expects: tuple[str, str] | None
    ) -> None:
        """Begin calls; their answers are to be had from `collect`."""
        await self.start(expects)
        self._answers.setdefault(client, [])
        self._answered.setdefault(client, asyncio.Event())
        for number, method, args in calls:
            task = asyncio.create_task(self._run(client, number, getattr(self._service, method)(*args)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, client: str, number: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            answer = (number, True, await work)
        except Exception as error:
            answer = (number, False, error)
        self._answers[client].append(answer)
        self._answered[client].set()

    async def collect(self, client: str) -> list[tuple[int, bool, Any]]:
        """Answers since the last call as (number, succeeded, value or exception)."""
        answered = self._answered.setdefault(client, asyncio.Event())
        try:
            async with asyncio.timeout(COLLECT_WAIT_S):
                await answered.wait()
        except TimeoutError:
            return []
        await asyncio.sleep(GATHER_S)
        answered.clear()
        answers = self._answers.get(client, [])
        self._answers[client] = []
        return answers

    async def close(self) -> None:
        """End the service and what belongs to it."""
        if self._service is not None and hasattr(self._service, "close"):
            await self._service.close()
        self._service = None


@dataclass(slots=True)
class _Call:
    method: str
    args: tuple[Any, ...]
    future: asyncio.Future[Any]
    started: float


@dataclass(slots=True)
class ServiceClient:
    """One client of a `ServiceHost` actor; belongs to one event loop.

    When the actor dies, Ray restarts it within its limits and the calls it held are sent again.
    """

    handle: Any
    name: str
    timeout_s: float
    resends: int = 3
    expects: tuple[str, str] | None = None
    """(path, digest) of the checkpoint that every call must be answered by."""
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _numbers: Any = field(default_factory=itertools.count)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _outbox: list[int] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _collecting: bool = False

    async def call(self, method: str, *args: Any) -> Any:
        """Call `method` of the service.

        Raises:
            ServiceError: no answer in time, or the actor is gone for good.
        """
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        call = _Call(method, args, loop.create_future(), time.monotonic())
        self._calls[number] = call
        if not self._outbox:
            loop.call_soon(self._flush)
        self._outbox.append(number)
        if not self._collecting:
            self._collecting = True
            self._spawn(self._collect())
        return await call.future

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _flush(self) -> None:
        numbers, self._outbox = self._outbox, []
        self._spawn(self._submit(numbers))

    async def _submit(self, numbers: list[int]) -> None:
        calls = [(n, self._calls[n].method, self._calls[n].args) for n in numbers if n in self._calls]
        try:
            await self.handle.submit.remote(self._id, calls, self.expects)
        except RayActorError:
            return  # the collector notices too, and sends what is unanswered again
        except Exception as error:
            for number in numbers:
                self._settle(number, False, error)

    async def _collect(self) -> None:
        deaths = 0
        try:
            while self._calls:
                try:
                    answers = await self.handle.collect.remote(self._id)
                except RayActorError as error:
                    deaths += 1
                    if deaths > self.resends:
                        self._fail(ServiceError(f"{self.name} died {deaths} times; the last time: {error}"))
                        return
                    await asyncio.sleep(1.0)
                    self._spawn(self._submit(list(self._calls)))
                    continue
                for number, succeeded, value in answers:
                    self._settle(number, succeeded, value)
                self._expire()
        except Exception as error:
            self._fail(error)
        finally:
            self._collecting = False

    def _settle(self, number: int, succeeded: bool, value: Any) -> None:
        call = self._calls.pop(number, None)
        if call is None or call.future.done():
            return
        if succeeded:
            call.future.set_result(value)
        else:
            call.future.set_exception(value)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [(n, c) for n, c in self._calls.items() if now - c.started > self.timeout_s]
        for number, call in late:
            message = f"{self.name} has not answered `{call.method}` for {self.timeout_s:.0f} s"
            self._settle(number, False, ServiceError(message))

    def _fail(self, error: Exception) -> None:
        for number in list(self._calls):
            self._settle(number, False, error)


@dataclass(frozen=True, slots=True)
class RemotePolicy:
    """A policy engine behind its actor (`evolve.types.Policy`)."""

    client: ServiceClient

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        return await self.client.call("propose", prefixes, n, sampling)

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return await self.client.call("encode", texts)

    async def stats(self) -> Mapping[str, float]:
        return await self.client.call("stats")


@dataclass(frozen=True, slots=True)
class RemoteReward:
    """A PPM engine behind its actor (`evolve.types.Reward`)."""

    client: ServiceClient

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        return await self.client.call("score", requests)

    async def score_steps(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Unbounded score of every step of each request."""
        return await self.client.call("score_steps", requests)

    async def stats(self) -> Mapping[str, float]:
        return await self.client.call("stats")


@dataclass(frozen=True, slots=True)
class RemoteVerifier:
    """A verifier behind its actor (`evolve.types.Verifier`)."""

    client: ServiceClient

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        return await self.client.call("check", problem, parent, step)

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        return await self.client.call("grade", problem, answer)

    async def group(self, answers: Sequence[str]) -> list[int]:
        return await self.client.call("group", answers)

    async def stats(self) -> Mapping[str, float]:
        return await self.client.call("stats")


def get(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline and a name.

    Raises:
        ServiceError: `what` did not come within `timeout_s` seconds.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ServiceError(f"waited {timeout_s:.0f} s in vain for {what}") from error
