"""The entry point to training: a group of Ray Train workers that takes one job after the other.

Starting a group costs 10 to 25 s on a laptop (processes, imports, process group), a tiny model's training
hardly more. So the function that Ray Train runs is a server: jobs reach it through a mailbox actor, and a
group can be started ahead of time and kept.

    with TrainerGroup(Workers(2), storage) as group:
        sft, ppm = group.fit([sft_job, ppm_job])

When a worker dies, Ray Train starts the group anew and the job goes on from its last checkpoint. Checkpoints
lie beside the output and are found there, so that a new driver finds them as well; they are not reported to
Ray Train, whose record can miss one that was made less than a second before a crash.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from evolve.files import Place, place
from evolve.learn.errors import TrainerDied, TrainingTimeoutError
from evolve.learn.jobs import TrainJob, TrainResult, Workers
from evolve.learn.mailbox import Mailbox, Standing, Task
from evolve.learn.worker import serve
from evolve.remote import RemotePath
from evolve.service import get

OnProgress = Callable[[TrainJob, Mapping[str, float]], None]
OnNote = Callable[[str], None]

_WAIT_S = 0.5
_CLOSE_S = 30.0
_ANSWER_S = 60.0
"""For the mailbox, which does nothing else, to answer."""
_HANG_S = 120.0
"""How long after a job's time limit its workers, which see to it themselves, are taken to hang."""
_UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Callbacks of Ray Train that each start a process."""


class TrainerGroup:
    """Trainer workers that live until `close`.

    `storage` is a directory for Ray Train's own bookkeeping. `max_failures`: how often the group may lose a
    worker before `fit` gives up. `start_timeout_s` bounds every wait for all workers to be there: nodes may have
    to come for them, at first and in place of lost ones.
    """

    def __init__(
        self,
        workers: Workers,
        storage: str | Place,
        *,
        max_failures: int = 3,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.workers = workers
        self._storage = place(storage).absolute()
        self._max_failures = max_failures
        self._start_timeout_s = start_timeout_s
        self._mailbox: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to start the workers, without waiting for them. Done by `fit` where there are none."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.close()
        self._error = None
        lives: dict[str, Any] = {"max_restarts": self._max_failures, "max_task_retries": -1}
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000, **lives).remote()
        self._thread = threading.Thread(target=self._run, name="trainer-group", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Ray Train's `fit`, which returns when the workers do."""
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2._internal.execution.callback import WorkerGroupCallback
        from ray.train.v2.api.config import FailureConfig

        mailbox = self._mailbox

        class Announce(WorkerGroupCallback):
            """Tells the mailbox of every start of workers; runs where Ray Train's controller does."""

            def before_worker_group_start(self, worker_group_context: Any) -> None:
                get(mailbox.begin_group.remote(), _ANSWER_S, "the trainers' mailbox")

        class Trainer(TorchTrainer):
            """Without processes that have nothing to do here: each costs seconds of CPU and 200 MB.

            One watches the controller through Ray's dashboard, to remove the placement group of a dead one while its
            driver lives. Here the driver ends with an error then, and its placement groups with it; and where no
            dashboard runs, it does nothing but complain once a second. Another hands out Ray's data sets, of which
            there are none.
            """

            def _create_default_callbacks(self) -> list[Any]:
                callbacks = super()._create_default_callbacks()  # type: ignore[misc]
                return [Announce(), *(c for c in callbacks if type(c).__name__ not in _UNUSED)]

        # Else Ray Train asks for room anew each minute, and every time counts as a failure. `fit` is less patient.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self._start_timeout_s + _HANG_S)
        # One more process: it would tell workers that their node is drained, and none asks it. They go on elsewhere.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        trainer = Trainer(
            serve,
            train_loop_config={
                "mailbox": self._mailbox,
                "gpu": self.workers.gpu,
                "cpus": self.workers.cpus,
            },
            scaling_config=ScalingConfig(
                num_workers=self.workers.count,
                use_gpu=self.workers.gpu,
                resources_per_worker={"CPU": self.workers.cpus, **({"GPU": 1} if self.workers.gpu else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if self.workers.gpu else "gloo"),
            run_config=RunConfig(
                name=f"trainer-{uuid.uuid4().hex[:8]}",
                **_storage(self._storage),
                failure_config=FailureConfig(
                    max_failures=self._max_failures, controller_failure_limit=self._max_failures
                ),
                checkpoint_config=CheckpointConfig(),
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            # Raised again in the thread that waits for a result.
            self._error = error

    def fit(
        self, jobs: Sequence[TrainJob], on_progress: OnProgress | None = None, on_note: OnNote | None = None
    ) -> list[TrainResult]:
        """Train the jobs in order; a job may start from the output of one before it.

        `on_note` is told, once, what the user should know, such as a checkpoint that could not be used.

        Raises `LearningError` for rows or settings that cannot be trained with, `TrainingTimeoutError`
        after a job's `config.timeout_s` or when workers are not there in time, and `TrainerDied` when workers
        or their mailbox keep dying.
        """
        for job in jobs:
            job.check(self.workers.count)
        self.start()
        return [self._fit(_absolute(job), on_progress, on_note) for job in jobs]

    def _fit(self, job: TrainJob, on_progress: OnProgress | None, on_note: OnNote | None) -> TrainResult:
        name = self._submit(job)
        limit = job.config.timeout_s + _HANG_S
        start_by: float | None = time.monotonic() + self._start_timeout_s
        deadline = time.monotonic() + self._start_timeout_s + limit
        groups = told = 0
        seen: dict[str, float] = {}
        while True:
            standing: Standing = self._ask("standing", name, _WAIT_S)
            if not standing.known:
                # A new mailbox, which knows nothing of the workers either that are at work.
                name, groups, told, start_by = self._submit(job), 0, 0, None
                continue
            if standing.metrics is not None and standing.metrics != seen:
                seen = standing.metrics
                if on_progress is not None:
                    on_progress(job, seen)
            for text in standing.notes[told:]:
                if on_note is not None:
                    on_note(text)
            told = len(standing.notes)
            if isinstance(standing.outcome, Exception):
                raise standing.outcome
            if standing.outcome is not None:
                return standing.outcome
            self._check_alive(job)
            now = time.monotonic()
            if standing.groups > groups:
                groups, start_by = standing.groups, start_by or now + self._start_timeout_s
            if start_by is not None and standing.workers >= self.workers.count:
                start_by, deadline = None, now + limit
            if start_by is not None and now > start_by:
                self._kill()
                raise TrainingTimeoutError(self._lacking(job, standing.workers))
            if now > deadline:
                at = f"step {seen['step']:.0f} of {seen['steps']:.0f}" if seen else "no step done"
                self._kill()
                raise TrainingTimeoutError(
                    f"{job.kind} training of {job.output} hangs: its workers did not stop at the limit of "
                    f"{job.config.timeout_s:.0f} s ({at}) and were killed; run again to go on from the last "
                    "checkpoint"
                )

    def _submit(self, job: TrainJob) -> str:
        task = Task(uuid.uuid4().hex, job)
        self._ask("submit", task)
        return task.name

    def _lacking(self, job: TrainJob, there: int) -> str:
        """What is said when only so many workers are there in time."""
        free, count = ray.available_resources(), self.workers.count
        have = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
        return (
            f"{job.kind} training of {job.output}: {there} of its {count} workers ({self.workers.cpus:g} CPUs"
            f"{' and a GPU' if self.workers.gpu else ''} each) have started within {self._start_timeout_s:.0f} s, "
            f"{count - there} are missing; the cluster has {have} free. Add nodes and run again to go on from the last "
            f"checkpoint in {job.partial}; or begin it anew with as many as there is room for: set sft.workers, and "
            "run.allow_changes=true"
        )

    def _check_alive(self, job: TrainJob) -> None:
        if self._thread is not None and not self._thread.is_alive():
            reason = str(self._error).strip().splitlines()
            raise TrainerDied(
                f"the trainer group ended during the training of {job.output}, after its workers died, or could not be "
                f"started, more than {self._max_failures} times (cluster.restarts): "
                f"{reason[-1] if reason else 'no reason was given'}\n"
                f"Steps up to the last checkpoint in {job.partial} are kept."
            ) from self._error

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the mailbox, which Ray restarts when it dies."""
        question = getattr(self._mailbox, method).remote(*arguments)
        try:
            return get(question, _ANSWER_S, f"the trainers' mailbox ({method})")
        except RayActorError as error:
            raise TrainerDied(f"the trainers' mailbox died more than {self._max_failures} times: {error}") from error

    def pids(self) -> dict[int, int]:
        """Process id of each worker that has started, by rank."""
        if self._mailbox is None:
            return {}
        return {rank: pid for rank, (_, pid) in self._ask("workers").items()}

    def _kill(self) -> None:
        """End workers that may hang."""
        self._ask("close")
        for worker, _ in self._ask("workers").values():
            ray.kill(worker)

    def close(self) -> None:
        """Let the workers end and give their resources back. May be called twice."""
        if self._thread is None:
            return
        with contextlib.suppress(TrainerDied):  # workers without a mailbox end by themselves
            self._ask("close")
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                self._kill()
                self._thread.join(_CLOSE_S)
        ray.kill(self._mailbox)
        self._thread = None


def fit(
    jobs: Sequence[TrainJob],
    workers: Workers,
    storage: str | Place,
    on_progress: OnProgress | None = None,
) -> list[TrainResult]:
    """Train the jobs one after the other in one group of workers that ends with them."""
    with TrainerGroup(workers, storage) as group:
        return group.fit(jobs, on_progress)


def _storage(directory: Place) -> dict[str, Any]:
    """Where Ray Train keeps its books, as it wants to be told."""
    if not isinstance(directory, RemotePath):
        return {"storage_path": str(directory)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = directory.filesystem()
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def _absolute(job: TrainJob) -> TrainJob:
    """The job with absolute paths: workers run in a directory of their own."""
    return replace(
        job,
        initial=str(place(job.initial).absolute()),
        rows=tuple(str(place(path).absolute()) for path in job.rows),
        output=str(place(job.output).absolute()),
        metrics=None if job.metrics is None else str(place(job.metrics).absolute()),
    )
