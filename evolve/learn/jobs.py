"""What a trainer is asked to do, and what it answers. Plain data; nothing heavy is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from evolve.files import Place, file_digest, place
from evolve.learn.errors import LearningError
from evolve.policy import checkpoint
from evolve.schema import PPMConfig, Precision, SFTConfig

RESULT_FILE = "training.json"
"""In a published checkpoint: the job's digest and its metrics."""


def partial_of(output: str | Place) -> Place:
    """Where checkpoints lie while a training is under way that will publish `output`."""
    output = place(output)
    return output.with_name(output.name + ".partial")


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training: SFT with an `SFTConfig`, a PPM with a `PPMConfig`."""

    config: SFTConfig | PPMConfig
    initial: str
    """Checkpoint directory that training starts from; may be the output of the job before. This and what follows are
    paths that all workers see, or URIs in an object store."""
    rows: tuple[str, ...]
    """Files of training rows (`evolve.learn.rows`): trajectories for SFT, step pairs for a PPM."""
    output: str
    """Directory to publish. Checkpoints lie in `<output>.partial` meanwhile."""
    seed: int = 0
    metrics: str | None = None
    """File to which one JSON line a step is appended. After a resume steps may occur twice: the last counts."""

    @property
    def kind(self) -> str:
        return "ppm" if isinstance(self.config, PPMConfig) else "sft"

    @property
    def partial(self) -> Place:
        """Working directory of the job."""
        return partial_of(self.output)

    def digest(self) -> str:
        """Identifies what determines the result, up to the order of floating-point sums.

        The initial checkpoint and the rows count by their content, wherever they lie. Raises `FileNotFoundError`
        when they are not there.
        """
        known = asdict(self)
        for name in ("metrics", "output"):
            del known[name]
        known["initial"] = checkpoint.digest(self.initial)
        known["rows"] = [file_digest(place(path)) for path in self.rows]
        for name in ("timeout_s", "checkpoint_steps", "workers", "cpus_per_worker", "engine"):
            known["config"].pop(name, None)
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def check(self, workers: int) -> None:
        """Raise `LearningError` for settings that cannot be trained with."""
        c, where = self.config, f"{self.kind} training of {self.output}"
        problems = {
            f"`batch` is {c.batch}: use at least the number of workers, {workers}": c.batch < workers,
            f"`epochs` is {c.epochs}: use a number above 0": not c.epochs > 0,
            f"`schedule` is {c.schedule!r}: use linear or cosine": c.schedule not in ("linear", "cosine"),
            f"`zero_stage` is {c.zero_stage}: use 0, 1, 2 or 3": c.zero_stage not in range(4),
            "`zero_stage` 0 keeps no fp32 weights beside bf16 ones: use 1, 2 or 3, or precision fp32": (
                c.zero_stage == 0 and c.precision is Precision.bf16
            ),
            f"`rows_tokens` ({c.rows_tokens}) is below `max_length` ({c.max_length}): a sequence of the "
            "greatest length must fit a row": c.rows_tokens < c.max_length,
            f"`workers` is {c.workers}, but the trainer group has {workers}": c.workers not in (None, workers),
            f"`checkpoint_steps` is {c.checkpoint_steps}: use at least 1": c.checkpoint_steps < 1,
            "no row files were given": not self.rows,
        }
        for problem, found in problems.items():
            if found:
                raise LearningError(f"{where}: {problem}")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A published checkpoint."""

    kind: str
    output: str
    metrics: Mapping[str, float]
    """Both: `loss` (mean over the last epoch's steps), `first_loss`, `steps`, `items`, `tokens`, `seconds`,
    `tokens_per_second`, `overlong` and `unsupervised` (rows dropped), `resumed_from` (steps).
    SFT: `token_accuracy` of the last step. PPM: `pairs`, `pair_accuracy_train` of the last step, and where
    problems are held out `validation_pairs`, `pair_accuracy` and `pair_accuracy_before` (of the initial
    model), `validation_loss`."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes of a trainer group."""

    count: int
    gpu: bool = False
    """One GPU each, NCCL between them; else CPUs and gloo."""
    cpus: float = 1.0
    """CPUs of each, and (rounded down) its torch threads."""
