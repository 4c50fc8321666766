"""The rows of a training as every process of it sees them: files that are memory-mapped, and items made of them.

However many rows a round has left, a process holds a few numbers a row; the tokens stay in the files, and what is
cached of those is shared by all processes of a node.
"""

from __future__ import annotations

from evolve.files import Place
from evolve.learn import rows
from evolve.learn.forest import Pairs
from evolve.learn.jobs import TrainJob
from evolve.learn.packing import Completions
from evolve.learn.split import held_out
from evolve.schema import PPMConfig
from evolve.types import StepPair, Trajectory

Data = Completions | Pairs

_ATTENTION_BREAK_EVEN = 4
"""Times the hidden size: the row length at which attention costs as much as the rest. Measured: 530 tokens at
hidden size 128 on a CPU (65 µs a token at length 128, 150 µs at 1024)."""


def gather_rows(job: TrainJob) -> None:
    """Make the files that `load_data` reads from the job's rows; those of an earlier attempt are replaced.

    A PPM's pairs go to two: those of problems that training never sees apart.
    """
    config, paths = job.config, rows_files(job)
    if not isinstance(config, PPMConfig):
        rows.gather(job.rows, paths[0], Trajectory)
        return
    share = config.validation_share
    rows.gather(job.rows, paths[0], StepPair, lambda problem: not held_out(problem, share))
    rows.gather(job.rows, paths[1], StepPair, lambda problem: held_out(problem, share))


def rows_files(job: TrainJob) -> list[Place]:
    """Training rows and, for a PPM, validation rows, in the job's working directory."""
    kinds = ("training", "validation") if isinstance(job.config, PPMConfig) else ("training",)
    return [job.partial / f"{kind}.arrow" for kind in kinds]


def load_data(job: TrainJob, hidden_size: int) -> tuple[Data, Pairs | None]:
    """Training items and, for a PPM, validation items, from the files that `gather_rows` has made."""
    tables = [rows.read(path) for path in rows_files(job)]
    config = job.config
    if not isinstance(config, PPMConfig):
        return Completions(tables[0], config.max_length), None
    training, validation = (
        Pairs(
            table,
            max_length=config.max_length,
            break_even=_ATTENTION_BREAK_EVEN * hidden_size,
            budget=config.rows_tokens,
            batch=config.batch,
        )
        for table in tables
    )
    return training, validation
