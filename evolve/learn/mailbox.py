"""Where the driver leaves a job for a trainer group, and the workers leave its result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evolve.errors import StorageError
from evolve.learn.errors import LearningError, TrainingStopped, TrainingTimeoutError
from evolve.learn.jobs import TrainJob, TrainResult

Outcome = TrainResult | LearningError | TrainingTimeoutError | TrainingStopped | StorageError


@dataclass(frozen=True, slots=True)
class Task:
    """A job that was handed in; the same job may be handed in again, as another task."""

    name: str
    job: TrainJob


@dataclass(frozen=True, slots=True)
class Standing:
    """What the driver is told of the task it asks for."""

    known: bool
    """Whether this mailbox has the task; one that died since has not, and is handed it again."""
    outcome: Outcome | None = None
    """None: not yet."""
    metrics: dict[str, float] | None = None
    """The latest of the training, once there are some."""
    notes: tuple[str, ...] = ()
    """What its workers want the user to know of it."""
    groups: int = 0
    """How often workers were begun to be started, as far as this mailbox was told: one more, and those before are
    gone."""
    workers: int = 0
    """How many of the newest have asked for a task."""


class Mailbox:
    """One task and what became of it; runs as a Ray actor.

    It holds nothing that its two sides could not say again, so that Ray may restart it empty: workers on their way go
    on, the driver hands its job in again, and workers that had finished it look their result up.
    """

    def __init__(self) -> None:
        self._task: Task | None = None
        self._outcome: Outcome | None = None
        self._metrics: dict[str, float] | None = None
        self._notes: tuple[str, ...] = ()
        self._groups = 0
        self._workers: dict[int, tuple[Any, int]] = {}
        self._closed = False
        self._changed = asyncio.Condition()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, ready: Callable[[], bool], wait_s: float) -> None:
        """Wait for a condition, at most `wait_s`; that it does not hold then is the caller's to see."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), wait_s)
            except TimeoutError:
                return

    async def submit(self, task: Task) -> None:
        """Leave a task for the workers; the one before it is forgotten."""
        self._task, self._outcome, self._metrics, self._notes = task, None, None, ()
        await self._notify()

    async def begin_group(self) -> None:
        """Workers are about to be started; there are none of before any longer."""
        self._groups += 1
        self._workers = {}

    async def workers(self) -> dict[int, tuple[Any, int]]:
        """Actor and process id of each worker of the newest group that has asked for a task, by rank."""
        return self._workers

    async def take(self, rank: int, worker: Any, pid: int, done: str | None, wait_s: float) -> Task | str:
        """The task to work on, which is none that has an outcome, nor the one that this worker has `done`.

        Answers "wait" when there is none within `wait_s`, and "closed" when there will be none.
        """
        self._workers[rank] = (worker, pid)
        await self._notify()
        await self._until(lambda: self._closed or self._open_task(done) is not None, wait_s)
        if self._closed:
            return "closed"
        return self._open_task(done) or "wait"

    def _open_task(self, done: str | None) -> Task | None:
        task = self._task
        return task if task is not None and self._outcome is None and task.name != done else None

    async def progress(self, name: str, metrics: dict[str, float]) -> bool:
        """Note the metrics of a task; whether it may go on."""
        if self._task is not None and self._task.name == name:
            self._metrics = metrics
        return not self._closed

    async def note(self, name: str, text: str) -> None:
        """Leave word of a task for the user."""
        if self._task is not None and self._task.name == name:
            self._notes += (text,)

    async def finish(self, name: str, outcome: Outcome) -> None:
        """Note what became of a task."""
        if self._task is not None and self._task.name == name:
            self._outcome = outcome
        await self._notify()

    async def standing(self, name: str, wait_s: float) -> Standing:
        """How task `name` stands, once it has an outcome or after `wait_s`."""
        if self._task is None or self._task.name != name:
            return Standing(known=False)
        await self._until(lambda: self._outcome is not None, wait_s)
        return Standing(True, self._outcome, self._metrics, self._notes, self._groups, len(self._workers))

    async def close(self) -> None:
        """Let workers that ask for a task end, and those at work stop at a checkpoint."""
        self._closed = True
        await self._notify()
