"""Evaluate what a round of a run has trained, on its held-out problems or on others.

    python -m benchmarks.evaluation RUN --round K [key=value ...]

RUN is a run directory whose round K is finished; round 0 is the base model. Settings are those the run was saved with;
arguments change them, e.g. problems.test_path=aime.jsonl evaluate.samples=64. Prints the table of the run's own
evaluations and writes RUN/evaluations/round-K-TIME.json: arguments, checkpoint digests, rows, and one record a problem.
The run itself is not changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from evolve import cluster, report
from evolve.config import load
from evolve.driver import exit_status
from evolve.evaluate import table
from evolve.files import publish_json
from evolve.fleet import Checkpoint, Fleet
from evolve.policy.checkpoint import digest, resolve
from evolve.problems import load_problems
from evolve.progress import ProgressLine
from evolve.schema import EvolveConfig
from evolve.stages.evaluation import measure
from evolve.stages.run import checkpoint
from evolve.store.run import RunDirectory, RunError


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, e.g. runs/quickstart")
    parser.add_argument("--round", type=int, required=True, metavar="K", help="whose policy and PPM; 0: the base model")
    options, overrides = parser.parse_known_args(argv)
    return exit_status(lambda: evaluate(RunDirectory(options.run.absolute()), options.round, overrides))


def evaluate(run: RunDirectory, k: int, overrides: Sequence[str]) -> None:
    """Measure the checkpoints of round `k`, print the table and write it into the run directory.

    Raises:
        RunError: this is no run, or its round `k` is not finished.
    """
    if not run.config.is_file():
        raise RunError(f"{run.path} is no run directory: it has no config.yaml")
    config = load([f"conf={run.config}", *overrides])
    policy, ppm = checkpoints(run, k, config)
    problems = load_problems(config).test
    fleet = Fleet(config, cluster.connect(config.cluster))
    try:
        records = measure(config, fleet, k, policy, ppm, problems, ProgressLine())
    finally:
        fleet.stop()
    rows = [asdict(row) for row in table(records, config.evaluate.bootstrap_resamples)]
    path = run.path / "evaluations" / f"round-{k}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    digests = {"policy": policy.digest, "ppm": ppm.digest if ppm else None}
    found = {"round": k, "arguments": list(overrides), "digests": digests, "rows": rows}
    publish_json(path, {**found, "records": [asdict(record) for record in records]})
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.evaluation_table(rows, f"{run.path.name}, {'base model' if k == 0 else f'round {k}'}"))
    console.print(f"Written to {path}.")


def checkpoints(run: RunDirectory, k: int, config: EvolveConfig) -> tuple[Checkpoint, Checkpoint | None]:
    """Policy and PPM of a round of a run; the base model has no PPM.

    Raises:
        RunError: the round is not finished.
    """
    if k:
        return checkpoint(run.round(k), "sft"), checkpoint(run.round(k), "ppm")
    path = str(run.base) if config.policy.model == "toy" else resolve(config.policy.model, config.policy.revision)
    if not Path(path).is_dir():
        raise RunError(f"{run.path} has no base model yet; run its first round")
    return Checkpoint(path, digest(path)), None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
