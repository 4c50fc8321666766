"""A run that is being driven: opening it checks all that can be checked before anything starts."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from rich.console import Console

from evolve import cluster, report
from evolve.errors import EvolveError, StorageError
from evolve.files import (
    Place,
    entries,
    is_published,
    remove_asides,
    remove_tree,
    storage_errors,
)
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.learn.jobs import Workers
from evolve.learn.resuming import workers_of_checkpoint
from evolve.learn.trainer import TrainerGroup
from evolve.policy.checkpoint import DigestMismatch, digest, files_of, resolve, verify
from evolve.problems import ProblemSet, load_problems
from evolve.progress import ProgressLine, duration
from evolve.remote import RemotePath
from evolve.schema import EvolveConfig
from evolve.stages.ending import Lifeline, obey_signals
from evolve.stages.start import check_same_start, inputs_of, record_start
from evolve.store.lease import driver_lock
from evolve.store.parts import PATTERN
from evolve.store.run import RoundDirectory, RunDirectory, RunError


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
        return self.base if round_ == 0 else checkpoint(self.directory.round(round_), "sft")

    def ppm(self, round_: int) -> Checkpoint | None:
        """The PPM trained in a round; None for round 0."""
        return None if round_ == 0 else checkpoint(self.directory.round(round_), "ppm")

    def resize_trainers(self, partial: Place) -> None:
        """Before trainers are started: on GPUs, as many as there are now, for nodes may have come or gone; or as many
        as an interrupted training in `partial` had."""
        if self.fleet.device == "gpu":
            interrupted = workers_of_checkpoint(partial)
            self.trainers.workers = trainer_workers(self.config, self.fleet.device, interrupted)

    def tell(self, notes: list[str]) -> None:
        """Show, once, what was mended: `notes`, and what happened to actors and nodes."""
        watch = self.fleet.watch
        said = [*notes, *self.fleet.events]
        said += [f"{name} is back after {seconds:.1f} s ({why})" for name, why, seconds in watch.recoveries]
        for text in said:
            self.line.end(text)
        notes.clear()
        self.fleet.events.clear()
        watch.recoveries.clear()


def checkpoint(directory: RoundDirectory, stage: str) -> Checkpoint:
    """What a finished `stage` (`sft` or `ppm`) of a round has published.

    Raises:
        RunError: that stage is not finished.
    """
    entry = directory.finished(stage)
    if entry is None:
        raise RunError(
            f"round {directory.number} has no finished {stage} checkpoint in {directory.path}; run that round first: "
            f"python -m evolve.driver ... round={directory.number}"
        )
    path = directory.path / stage / "checkpoint"
    try:
        verify(path, entry["digest"])
    except (DigestMismatch, FileNotFoundError) as error:
        raise RunError(
            f"{error}\nRestore {path} from a backup. Without one, delete it and {directory.path / 'manifest.json'}, "
            f"and run with round={directory.number}: the round's trees are taken over, the rest of it is made anew. "
            f"Later rounds were made with the lost checkpoint; delete them too if they must follow from the new one."
        ) from error
    return Checkpoint(str(path), entry["digest"])


@contextmanager
def open_run(config: EvolveConfig, engines: Engines = Engines()) -> Iterator[Run]:  # noqa: B008 (frozen)
    """Check everything that can be checked, lock the run directory, then start Ray and yield the run.

    `engines`: what serves as policy and PPM.

    Raises:
        RunError, ProblemsError: before anything is started; a RunError also later, with what is safe and how to go on.
    """
    console, line = Console(width=None if sys.stdout.isatty() else 120), ProgressLine()
    directory = RunDirectory.of(config.run.dir, config.run.name)
    problems = load_problems(config)
    for note in problems.notes:
        console.print(f"note: {note}")
    _check_order(config, directory)
    with ExitStack() as ending:
        lock = driver_lock(directory)
        lock.acquire()
        ending.callback(lock.release)
        remove_asides(directory.path)
        inputs = inputs_of(config, problems)
        check_same_start(config, directory, inputs)
        training = any(untrained(directory.round(k)) for k in rounds_to_do(config, directory))
        device = cluster.connect(config.cluster)
        if device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once imported here, warns of it
        record_start(config, directory, inputs)
        metrics = report.Metrics(directory, config, line.end)
        ending.callback(metrics.close)  # last of all that ends with the lock held: no accelerator waits for a network
        obey_signals()  # after Ray, which sets a handler of its own
        lifeline = Lifeline(lock.release, lambda: _safe(directory))
        ending.callback(lifeline.cut)
        trainers = TrainerGroup(
            trainer_workers(config, device),
            directory.path / "trainer",
            max_failures=config.cluster.restarts,
            start_timeout_s=config.cluster.placement_timeout_s,
        )
        ending.callback(trainers.close)
        if device == "cpu" and training:
            trainers.start()  # its imports run beside what comes before; on GPUs the engines must go first
        base = _base_model(config, directory, line)
        fleet = Fleet(config, device, engines, on_wait=lambda what: line.show(f"waiting for shards: {what}"))
        ending.callback(fleet.stop)
        try:
            with storage_errors(directory.path):
                yield Run(config, directory, problems, base, fleet, trainers, metrics, line, console)
        except RunError:
            raise
        except (EvolveError, RayError) as error:  # also a task's own error, or the memory of its node
            line.end("stopped")
            raise RunError(f"{error}\n{_safe(directory)}") from error


def _safe(directory: RunDirectory) -> str:
    """What a stopped run keeps, and how to go on."""
    lines = [f"Safe in {directory.path}:"]
    try:
        for found in _rounds(directory):
            parts = len(entries(found.trees, PATTERN))
            try:
                finished = ", ".join(found.manifest()) or "nothing finished yet"
            except RunError:
                finished = "its manifest is not readable"
            lines.append(f"  {found.path.name}: {finished}" + (f"; {parts} files of whole trees" if parts else ""))
    except StorageError:
        lines.append("  what was finished there; it does not answer now")
    lines.append(f"To go on: python -m evolve.driver {shlex.join(sys.argv[1:])}".rstrip())
    return "\n".join(lines)


def _rounds(directory: RunDirectory) -> list[RoundDirectory]:
    """The rounds that were begun, in order; a user's copies of them are none."""
    matches = (re.fullmatch(r"round-(\d+)", path.name) for path in entries(directory.path, "round-*"))
    return [directory.round(k) for k in sorted(int(match[1]) for match in matches if match)]


def rounds_to_do(config: EvolveConfig, directory: RunDirectory) -> list[int]:
    """The round asked for, or every round of the recipe that has no evaluation yet.

    Raises:
        RunError: a round's manifest is not readable.
    """
    if config.round is not None:
        return [config.round]
    return [k for k in range(1, len(config.rounds) + 1) if directory.round(k).finished("evaluation") is None]


def untrained(directory: RoundDirectory) -> list[str]:
    """The trainings that a round still lacks, in their order."""
    manifest = directory.manifest()
    return [stage for stage in ("sft", "ppm") if stage not in manifest]


def _check_order(config: EvolveConfig, directory: RunDirectory) -> None:
    """Round k needs the artefacts of round k - 1."""
    for earlier in range(1, config.round or 1):
        for stage in ("sft", "ppm"):
            checkpoint(directory.round(earlier), stage)


def _base_model(config: EvolveConfig, directory: RunDirectory, line: ProgressLine) -> Checkpoint:
    """The base model's directory and digest; the tiny world's model is made on first use."""
    if config.policy.model != "toy":
        return shared_model(config.policy.model, config.policy.revision, directory.base)
    seed_round = directory.round(0)
    if seed_round.finished("base") is None:
        from evolve.toy import seed_model

        started = time.monotonic()

        def progress(step: int, steps: int, loss: float) -> None:
            line.show(f"base model: pre-training step {step}/{steps}, loss {loss:.3f}")

        line.show("base model: making the tiny world's tokenizer and demonstrations", force=True)
        remove_tree(directory.base)  # of a driver that died before it could name it
        metrics = seed_model.build(config.toy, config.run.seed, directory.base, progress)
        seconds = time.monotonic() - started
        seed_round.record("base", digest=digest(directory.base), seconds=seconds, metrics=metrics)
        line.end(f"base model: made in {duration(seconds)}")
    entry = seed_round.finished("base")
    found = digest(directory.base) if is_published(directory.base) else ""
    if entry is None or found != entry["digest"]:
        raise RunError(f"{directory.base} is not the base model this run was started with; use another run.name")
    return Checkpoint(str(directory.base), found)


def shared_model(model: str, revision: str | None, copy: Place) -> Checkpoint:
    """A model that the recipe names, where every node has it: at its own place, or, for a run in an object store, whose
    nodes share nothing else, as a `copy` there, made on first use."""
    path = resolve(model, revision)
    found = Checkpoint(path, digest(path))
    if not isinstance(copy, RemotePath):
        return found
    if not copy.is_published():
        files = copy.put_files(Path(path), [file.name for file in files_of(path)])
        copy.publish(files)
    return Checkpoint(str(copy), verify(copy, found.digest))


def trainer_workers(config: EvolveConfig, device: str, interrupted: int | None = None) -> Workers:
    """The processes that train: `sft.workers`; or one for each GPU that the cluster has now, at most as many as a
    batch has items, and at least one: nodes may be on their way.

    `interrupted`: how many an interrupted training had. Only as many can go on from its checkpoint, so they are asked
    for where they are there, or may come.
    """
    count = 2
    if device == "gpu":
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = gpus
        if interrupted is not None and (interrupted <= gpus or cluster.may_grow(config.cluster)):
            count = interrupted
        count = max(1, min(count, config.sft.batch, config.ppm.batch))
    return Workers(config.sft.workers or count, device == "gpu", config.sft.cpus_per_worker)
