"""What runs in every process of a trainer group: one job after the other, until the group is closed."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from evolve.errors import StorageError
from evolve.files import storage_errors
from evolve.learn.errors import LearningError, TrainingStopped, TrainingTimeoutError
from evolve.learn.mailbox import Outcome, Task
from evolve.learn.training import Report, run_job
from evolve.service import get

_POLL_S = 20.0
_ANSWER_S = 120.0
"""For the mailbox, which does nothing else, to answer."""


def prepare_process(gpu: bool, cpus: float) -> None:
    """Settings of this process that must precede DeepSpeed's import."""
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    if not gpu:
        torch.set_num_threads(max(1, int(cpus)))
    import deepspeed
    import deepspeed.ops
    from transformers.utils import logging as transformers_logging

    # The driver shows what happens; these would write over its progress line.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    # An optional all-reduce through shared memory, which would be compiled at first use for two minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def serve(settings: Mapping[str, Any]) -> None:
    """Ray Train's per-worker function: take jobs from the mailbox until it is closed.

    After a worker has died Ray Train starts all of them anew; they go on with the job that was not finished,
    from its last checkpoint.
    """
    import ray
    import ray.train
    import torch.distributed as dist

    mailbox = settings["mailbox"]
    prepare_process(settings["gpu"], settings["cpus"])
    # Costs seconds of imports: better while the driver is still busy elsewhere than in the first job.
    import evolve.learn.engine  # noqa: F401

    rank = ray.train.get_context().get_world_rank()
    here = ray.get_runtime_context().current_actor
    done: str | None = None
    while True:
        question = mailbox.take.remote(rank, here, os.getpid(), done, _POLL_S)
        task: Task | str = get(question, _POLL_S + _ANSWER_S, "the trainers' mailbox")
        if task == "closed":
            return
        if isinstance(task, str):
            continue

        outcome: Outcome
        try:
            with storage_errors(task.job.partial):
                outcome = run_job(task.job, _reporter(mailbox, task.name), partial(mailbox.note.remote, task.name))
        except StorageError as error:
            # Of this worker alone: the others wait for it in vain, and end with it.
            get(mailbox.finish.remote(task.name, error), _ANSWER_S, "the trainers' mailbox")
            raise
        except (LearningError, TrainingTimeoutError, TrainingStopped) as error:
            # Raised by every worker alike; the group is sound and goes on.
            outcome = error
        else:
            ray.train.report({"task": task.name, **outcome.metrics})
        gc.collect()
        if rank == 0:
            get(mailbox.finish.remote(task.name, outcome), _ANSWER_S, "the trainers' mailbox")
        dist.barrier()  # nobody asks for the next task before this one has its outcome
        done = task.name


def _reporter(mailbox: Any, name: str) -> Report:
    """Sends metrics of task `name` to the mailbox without waiting; its answers say whether to go on."""
    import ray

    sent: list[Any] = []

    def report(metrics: Mapping[str, float]) -> bool:
        sent.append(mailbox.progress.remote(name, dict(metrics)))
        answered = ray.wait(sent, num_returns=len(sent), timeout=0)[0]
        for reference in answered:
            sent.remove(reference)
        return all(ray.get(answered))

    return report
