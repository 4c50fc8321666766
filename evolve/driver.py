"""The evolution, top to bottom: `python -m evolve.driver [conf=NAME] [round=K] [key=value ...] [--plan]`.

Running the same command again continues after the last finished tree and stage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from evolve.config import ConfigError, command
from evolve.errors import EvolveError
from evolve.problems import ProblemsError
from evolve.schema import EvolveConfig


def main(argv: Sequence[str]) -> int:
    """Drive a run; returns the exit status."""
    try:
        return exit_status(lambda: obey(argv))
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130


def exit_status(work: Callable[[], object]) -> int:
    """0 when `work` ends well; else its error is printed for the user: 2 before anything was begun, 1 after that."""
    try:
        work()
    except (ConfigError, ProblemsError) as error:
        print(error, file=sys.stderr)
        return 2
    except EvolveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def obey(argv: Sequence[str]) -> None:
    """Plan or evolve, as the command line says."""
    order = command(argv)
    if order.plan:
        from evolve.plan import show_plan

        show_plan(order.config)
    else:
        evolve(order.config)


def evolve(config: EvolveConfig) -> None:
    """Self-evolution as in rStar-Math: every round searches, learns from its trees, and is evaluated."""
    from evolve import stages

    with stages.open_run(config) as run:
        for k in stages.rounds_to_do(run.config, run.directory):
            stages.grow_trees(run, k)
            stages.extract_rows(run, k)
            stages.evaluate(run, 0)
            stages.train(run, k)
            stages.evaluate(run, k)
            stages.show(run, k)
        stages.show_all(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
