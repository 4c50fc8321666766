"""Calls to actors, coalesced: what many coroutines ask for in one moment travels in one Ray call.

A Ray call costs about a millisecond of CPU on both sides together; a search makes tens of thousands of requests. So a
client gathers the calls of one turn of its event loop into one `submit`, and fetches whatever has been answered since
with one `collect`, which waits at the actor. Every call still has its own answer, error and deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from evolve.errors import EvolveError
from evolve.types import Candidate, Outcome, Problem, Sampling, ScoreRequest, Verdict

COLLECT_WAIT_S = 10.0
"""How long a `collect` waits at the actor before it returns empty-handed."""
GATHER_S = 0.001
"""How long an answer waits for others to travel with."""
RETRY_S = 0.5
"""Between two attempts to reach an actor that has died."""


class ServiceError(EvolveError):
    """An actor did not answer in time, or died more often than it may be restarted."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """A sign of life of an actor's process."""

    serving: str | None
    """Digest of the checkpoint it serves, "" without one; None: its service is not started."""
    pid: int
    log: str
    """The file its standard error goes to, on its own node; empty when it is no file."""
    node: str
    """Ray's id of that node."""


def pulse_of_this_process(serving: str | None) -> Pulse:
    """A sign of life of the actor that calls this."""
    errors = Path("/proc/self/fd/2")
    log = str(errors.readlink()) if errors.is_symlink() else ""
    return Pulse(serving, os.getpid(), log, ray.get_runtime_context().get_node_id())


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

    async def pulse(self) -> Pulse:
        """A sign of life, while the service starts too.

        A service that has a `health` method is asked: an engine whose core is dead ends its actor there.
        """
        service = self._service
        if service is not None and hasattr(service, "health"):
            await service.health()
        serving = None if service is None else str(getattr(service, "digest", ""))
        return pulse_of_this_process(serving)

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
            task = asyncio.create_task(self._run(client, number, method, args))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, client: str, number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            answer = (number, True, await getattr(self._service, method)(*args))
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
    taken: float | None = None
    """When the actor took it; None: not yet, or by an actor that has died."""


@dataclass(slots=True)
class ServiceClient:
    """One client of a `ServiceHost` actor; belongs to one event loop.

    When the actor dies and is started again, the calls it held are sent again. Who may die how often is decided by
    who watches the actors (`evolve.watch`); the client is only patient.
    """

    handle: Any
    name: str
    timeout_s: float
    """For one answer, from when the actor took the call."""
    start_timeout_s: float = 7200.0
    """For an actor that is not ready, or gone, to be there again. Whoever watches the actors knows better what a start
    may take, and is stricter."""
    expects: tuple[str, str] | None = None
    """(path, digest) of the checkpoint that every call must be answered by."""
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _numbers: Any = field(default_factory=itertools.count)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _outbox: list[int] = field(default_factory=list)
    _lost: set[int] = field(default_factory=set)
    """Calls that an actor which has died did not answer."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _collecting: bool = False

    async def call(self, method: str, *args: Any) -> Any:
        """Call `method` of the service.

        Raises:
            ServiceError: no answer in time, or the actor is gone for good.
        """
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        call = _Call(method, args, loop.create_future())
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
        try:
            await self._send(numbers)
        except Exception as error:
            if _passing(error):
                self._lost.update(numbers)  # the collector sends them again
                return
            for number in numbers:
                self._settle(number, False, error)

    async def _send(self, numbers: Sequence[int]) -> None:
        """Return once the actor has taken the calls, which it does when its service is ready."""
        calls = [(n, self._calls[n].method, self._calls[n].args) for n in numbers if n in self._calls]
        try:
            async with asyncio.timeout(self.start_timeout_s):
                await self.handle.submit.remote(self._id, calls, self.expects)
        except RayTaskError:  # which may be a TimeoutError, too
            raise
        except TimeoutError as error:
            raise ServiceError(f"{self.name} was not ready within {self.start_timeout_s:.0f} s") from error
        now = time.monotonic()
        for number, _, _ in calls:
            if number in self._calls:
                self._calls[number].taken = now

    async def _collect(self) -> None:
        try:
            while self._calls:
                try:
                    if self._lost:
                        await self._send_again()
                    answers = await self.handle.collect.remote(self._id)
                except RayActorError:
                    self._lost.update(self._calls)
                    continue
                for number, succeeded, value in answers:
                    self._settle(number, succeeded, value)
                self._expire()
        except Exception as error:
            self._fail(error)
        finally:
            self._collecting = False

    async def _send_again(self) -> None:
        """Send what a dead actor held to the one that is started in its place.

        Raises:
            ServiceError: none was there in time.
        """
        deadline = time.monotonic() + self.start_timeout_s
        for number in self._lost & self._calls.keys():
            self._calls[number].taken = None
        while True:
            numbers = sorted(self._lost & self._calls.keys())
            try:
                await self._send(numbers)
            except (RayActorError, RayTaskError) as error:
                if not _passing(error):
                    raise
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{self.name} died and was not back within {self.start_timeout_s:.0f} s: {error}"
                    ) from error
                await asyncio.sleep(RETRY_S)
            else:
                self._lost.difference_update(numbers)
                return

    def _settle(self, number: int, succeeded: bool, value: Any) -> None:
        call = self._calls.pop(number, None)
        self._lost.discard(number)
        if call is None or call.future.done():
            return
        if succeeded:
            call.future.set_result(value)
        else:
            call.future.set_exception(value)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [(n, c) for n, c in self._calls.items() if c.taken is not None and now - c.taken > self.timeout_s]
        for number, call in late:
            message = f"{self.name} has not answered `{call.method}` for {self.timeout_s:.0f} s"
            self._settle(number, False, ServiceError(message))

    def _fail(self, error: Exception) -> None:
        for number in list(self._calls):
            self._settle(number, False, error)


def _passing(error: Exception) -> bool:
    """Whether another try may mend what befell a call on its way: the actor's death, or a start that failed."""
    return isinstance(error, RayActorError) or (isinstance(error, RayTaskError) and not for_good(error))


def for_good(error: RayTaskError) -> bool:
    """Whether a service that did not start because of this never will."""
    return isinstance(error.cause, EvolveError | ValueError | FileNotFoundError)


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


@dataclass(slots=True)
class Question:
    """One call to an actor, asked again and again and never waited for."""

    ask: Callable[[], Any]
    every_s: float
    _asked: float = float("-inf")
    _reference: Any = None

    def poll(self, now: float) -> Any | None:
        """The answer, once, when there is one; asks again when it is time. Raises what the call raised."""
        if self._reference is None:
            if now - self._asked < self.every_s:
                return None
            self._reference, self._asked = self.ask(), now
        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        reference, self._reference = self._reference, None
        return ray.get(reference)


def get(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline and a name.

    Raises:
        ServiceError: `what` did not come within `timeout_s` seconds.
        EvolveError: as the other side raised it, without Ray's traceback.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ServiceError(f"waited {timeout_s:.0f} s in vain for {what}") from error
    except RayTaskError as error:
        if isinstance(error.cause, EvolveError):
            raise error.cause from None
        raise
