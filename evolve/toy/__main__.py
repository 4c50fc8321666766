"""`python -m evolve.toy`: build the tiny world's seed model, or look at its problems.

python -m evolve.toy --output DIR [--seed S] [--steps N] [--workers W] [--operations K]
python -m evolve.toy --show 5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evolve.schema import ToyConfig
from evolve.toy.world import prompt, solution, specs


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    default = ToyConfig()
    parser = argparse.ArgumentParser(prog="python -m evolve.toy", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="directory to build the seed model in; must not exist")
    what.add_argument("--show", type=int, metavar="N", help="print N problems with their right solutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=default.pretrain_steps, help="pre-training steps")
    parser.add_argument("--workers", type=int, default=default.workers, help="processes")
    parser.add_argument("--operations", type=int, default=default.operations, help="kinds of event, 4 to 12")
    parser.add_argument("--difficulties", type=int, nargs="+", default=default.difficulties, help="numbers of events")
    options = parser.parse_args(arguments)
    if options.show is not None:
        _show(options.show, options.seed, options.difficulties, options.operations)
        return
    config = ToyConfig(
        difficulties=options.difficulties,
        operations=options.operations,
        pretrain_steps=options.steps,
        workers=options.workers,
    )
    _build(config, options.seed, options.output)


def _show(count: int, seed: int, difficulties: list[int], operations: int) -> None:
    for spec in specs(count, seed, "train", difficulties, operations):
        print(prompt(spec.question) + "".join(solution(spec)))
        print(f"answer: {spec.answer}\n")


def _build(config: ToyConfig, seed: int, output: Path) -> None:
    from evolve.toy.seed_model import build

    def progress(step: int, steps: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            print(f"\rpre-training step {step}/{steps}, loss {loss:.3f}", end="", file=sys.stderr, flush=True)

    metrics = build(config, seed, output, progress)
    print(file=sys.stderr)
    print(
        f"seed model at {output}: {metrics['parameters'] / 1e6:.2f} M parameters, "
        f"{metrics['tokens'] / 1e6:.2f} M tokens seen, loss {metrics['loss']:.3f}, "
        f"{metrics['seconds']:.0f} s in {config.workers} processes"
    )


if __name__ == "__main__":
    main()
