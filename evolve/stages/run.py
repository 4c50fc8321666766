"""A run that is being driven: opening it checks all that can be checked before anything starts."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console

from evolve import cluster, report
from evolve.cluster import Checkpoint, Fleet
from evolve.config import differences, read, to_yaml
from evolve.learn.jobs import Workers
from evolve.learn.trainer import TrainerGroup
from evolve.policy.checkpoint import digest, resolve
from evolve.problems import ProblemSet, load_problems
from evolve.progress import ProgressLine, duration
from evolve.schema import EvolveConfig
from evolve.store.files import publish_file
from evolve.store.run import Lock, RoundDirectory, RunDirectory, RunError


@dataclass(slots=True)
class Run:
    """A run that is being driven: its configuration, directory, problems, base model and actors."""

    config: EvolveConfig
    directory: RunDirectory
    problems: ProblemSet
    base: Checkpoint
    fleet: Fleet
    trainers: TrainerGroup
    metrics: report.Metrics
    line: ProgressLine
    console: Console

    def policy(self, round_: int) -> Checkpoint:
        """The policy trained in a round; the base model for round 0."""
        return self.base if round_ == 0 else _checkpoint(self.directory.round(round_), "sft")

    def ppm(self, round_: int) -> Checkpoint | None:
        """The PPM trained in a round; None for round 0."""
        return None if round_ == 0 else _checkpoint(self.directory.round(round_), "ppm")


def _checkpoint(directory: RoundDirectory, stage: str) -> Checkpoint:
    entry = directory.finished(stage)
    if entry is None:
        raise RunError(
            f"round {directory.number} has no finished {stage} checkpoint in {directory.path}; run that round first: "
            f"python -m evolve.driver ... round={directory.number}"
        )
    return Checkpoint(str(directory.path / stage / "checkpoint"), entry["digest"])


@contextmanager
def open_run(config: EvolveConfig) -> Iterator[Run]:
    """Check everything that can be checked, lock the run directory, then start Ray and yield the run.

    Raises:
        RunError, ProblemsError: before anything is started.
    """
    console, line = Console(width=None if sys.stdout.isatty() else 120), ProgressLine()
    directory = RunDirectory(Path(config.run.dir, config.run.name).absolute())
    problems = load_problems(config)
    for note in problems.notes:
        console.print(f"note: {note}")
    _check_order(config, directory)
    lock = Lock(directory)
    lock.acquire()
    try:
        _check_same_configuration(config, directory)
        device = cluster.connect(config.cluster)
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets a handler of its own
            signal.signal(number, _stop)
        base = _base_model(config, directory, line)
        fleet = Fleet(config, device)
        trainers = TrainerGroup(_workers(config, device), directory.path / "trainer")
        if device == "cpu":
            trainers.start()  # beside the search; on GPUs the engines must go first
        metrics = report.Metrics(directory, config)
        try:
            yield Run(config, directory, problems, base, fleet, trainers, metrics, line, console)
        finally:
            metrics.close()
            trainers.close()
            fleet.stop()
    finally:
        lock.release()


def _stop(number: int, frame: object) -> None:
    """End in good order on the first signal; a second one ends at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def rounds_to_do(run: Run) -> list[int]:
    """The round asked for, or every round of the recipe that has no evaluation yet."""
    if run.config.round is not None:
        return [run.config.round]
    rounds = range(1, len(run.config.rounds) + 1)
    return [k for k in rounds if run.directory.round(k).finished("evaluation") is None]


def _check_order(config: EvolveConfig, directory: RunDirectory) -> None:
    """Round k needs the artefacts of round k - 1."""
    for earlier in range(1, config.round or 1):
        for stage in ("sft", "ppm"):
            _checkpoint(directory.round(earlier), stage)


def _check_same_configuration(config: EvolveConfig, directory: RunDirectory) -> None:
    """Save the resolved configuration, or compare it with the one the run was started with."""
    if directory.config.exists():
        changed = differences(read(directory.config), config)
        if changed and not config.run.allow_changes:
            keys = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changed)
            raise RunError(
                f"{directory.path} was started under another configuration:\n{keys}\n"
                "Use another run.name, or run.allow_changes=true to continue: what is finished stays as it is."
            )
    publish_file(directory.config, lambda aside: aside.write_text(to_yaml(config)))


def _base_model(config: EvolveConfig, directory: RunDirectory, line: ProgressLine) -> Checkpoint:
    """The base model's directory and digest; the tiny world's model is made on first use."""
    if config.policy.model != "toy":
        path = resolve(config.policy.model, config.policy.revision)
        return Checkpoint(path, digest(path))
    seed_round = directory.round(0)
    if seed_round.finished("base") is None:
        from evolve.toy import seed_model

        started = time.monotonic()

        def progress(step: int, steps: int, loss: float) -> None:
            line.show(f"base model: pre-training step {step}/{steps}, loss {loss:.3f}")

        line.show("base model: making the tiny world's tokenizer and demonstrations", force=True)
        metrics = seed_model.build(config.toy, config.run.seed, directory.base, config.toy.threads, progress)
        seconds = time.monotonic() - started
        seed_round.record("base", digest=digest(directory.base), seconds=seconds, metrics=metrics)
        line.end(f"base model: made in {duration(seconds)}")
    entry = seed_round.finished("base")
    found = digest(directory.base)
    if entry is None or found != entry["digest"]:
        raise RunError(f"{directory.base} is not the base model this run was started with; use another run.name")
    return Checkpoint(str(directory.base), found)


def _workers(config: EvolveConfig, device: str) -> Workers:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = config.sft.workers or (gpus if device == "gpu" else 2)
    return Workers(count, device == "gpu", config.sft.cpus_per_worker)
