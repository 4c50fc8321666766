"""Where the driver leaves jobs for a trainer group, and the workers leave results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from evolve.learn.errors import LearningError, TrainingStopped, TrainingTimeoutError
from evolve.learn.jobs import TrainJob, TrainResult

Outcome = TrainResult | LearningError | TrainingTimeoutError | TrainingStopped


class Mailbox:
    """The state of a trainer group's jobs; runs as a Ray actor."""

    def __init__(self) -> None:
        self._jobs: list[TrainJob] = []
        self._outcomes: list[Outcome] = []
        self._progress: dict[int, dict[str, float]] = {}
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

    async def submit(self, job: TrainJob) -> int:
        self._jobs.append(job)
        await self._notify()
        return len(self._jobs) - 1

    async def register(self, rank: int, worker: Any, pid: int) -> int:
        """A worker has started; answers with the number of the job to begin with."""
        self._workers[rank] = (worker, pid)
        await self._notify()
        return len(self._outcomes)

    async def workers(self) -> dict[int, tuple[Any, int]]:
        return self._workers

    async def take(self, index: int, wait_s: float) -> TrainJob | str:
        """Job number `index`; "wait" when there is none yet, "closed" when there will be none."""
        await self._until(lambda: self._closed or index < len(self._jobs), wait_s)
        if self._closed:
            return "closed"
        return self._jobs[index] if index < len(self._jobs) else "wait"

    async def progress(self, index: int, metrics: dict[str, float]) -> bool:
        """Note the metrics of a job; whether it may go on."""
        self._progress[index] = metrics
        return not self._closed

    async def finish(self, index: int, outcome: Outcome) -> None:
        if index == len(self._outcomes):
            self._outcomes.append(outcome)
        await self._notify()

    async def outcome(self, index: int, wait_s: float) -> tuple[Outcome | None, dict[str, float]]:
        """The outcome of job `index` (None: not yet) and its latest metrics."""
        await self._until(lambda: index < len(self._outcomes), wait_s)
        done = self._outcomes[index] if index < len(self._outcomes) else None
        return done, self._progress.get(index, {})

    async def close(self) -> None:
        self._closed = True
        await self._notify()
