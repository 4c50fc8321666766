"""Does a PPM make search better? PPM-augmented against terminal-guided search, same policy, same fresh problems.

    python -m benchmarks.guidance runs/quickstart --round 3 [--problems 300] [--json FILE]

Needs a run of the tiny world whose round K - 1 is finished. Both searches get the policy and, where they use one, the
PPM of round K - 1. Terminal-guided search is run with several numbers of rollouts, so that one of them spends about the
tokens that PPM-augmented search spends; the table shows what every setting solved and cost. Data quality is judged by
the tiny world's oracle: the share of mined step pairs whose positive is right and whose negative is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import scene
from benchmarks.common import finish, parser
from benchmarks.evaluation import checkpoints
from evolve import cluster
from evolve.config import read, resolve_round
from evolve.evaluate import interval
from evolve.files import entries
from evolve.fleet import Checkpoint, Fleet
from evolve.learn.pairs import mine
from evolve.policy.formats import format_named
from evolve.schema import EvolveConfig, ValueKind
from evolve.search.shard import SearchJob
from evolve.store.run import RunDirectory
from evolve.store.trees import read_part
from evolve.toy.oracle import oracle_step_ok
from evolve.toy.world import problems as toy_problems
from evolve.tree import Tree
from evolve.types import Problem, RoundPlan, Sampling


def grow(
    config: EvolveConfig,
    fleet: Fleet,
    plan: RoundPlan,
    problems: Sequence[Problem],
    policy: Checkpoint,
    ppm: Checkpoint | None,
) -> tuple[list[Tree], float]:
    """All trees of one setting, and the seconds they took."""
    fmt = format_named(config.policy.format)
    with tempfile.TemporaryDirectory() as directory:
        job = SearchJob(
            plan=plan,
            run_seed=config.run.seed,
            format=config.policy.format,
            few_shot="",
            sampling=Sampling(config.policy.temperature, config.policy.top_p, config.policy.max_step_tokens, fmt.stop),
            max_depth=config.search.max_depth,
            context=config.policy.engine.max_model_len,
            concurrent_trees=config.search.concurrent_trees,
            concurrent_rollouts=1,
            tail_rollouts=1,
            trees=Path(directory),
            policy=policy.named,
            ppm=ppm.named if ppm and plan.value is ValueKind.ppm else None,
        )
        progress, seconds = scene.grow(fleet, problems, job)
        if progress.trees != len(problems):
            raise RuntimeError(f"{len(problems)} trees were asked for and {progress.trees} grown")
        return [tree for part in entries(job.trees, "*.parquet") for tree in read_part(part)], seconds


def pair_quality(config: EvolveConfig, trees: Sequence[Tree], problems: dict[str, Problem]) -> tuple[int, float]:
    """Step pairs mined, and the share of them that the oracle confirms."""
    confirmed = total = 0
    for tree in trees:
        texts = {tuple(tree.token_ids[i]): tree.text[i] for i in range(1, len(tree))}
        for pair in mine(tree, replace(config.ppm, trajectory_pairs=False)):
            prefix = [tree.text[i] for i in tree.path(pair.node)]
            problem = problems[tree.problem_id]
            right = oracle_step_ok(problem, [*prefix, texts[pair.positive_ids]])
            wrong = not oracle_step_ok(problem, [*prefix, texts[pair.negative_ids]])
            confirmed += right and wrong
            total += 1
    return total, confirmed / total if total else 0.0


def main() -> int:
    made = parser("guidance", __doc__, check=False)
    made.add_argument("run", type=Path, help="run directory of the tiny world, e.g. runs/quickstart")
    made.add_argument("--round", type=int, default=3, help="whose search (3)")
    made.add_argument("--problems", type=int, default=300, help="fresh problems (300)")
    arguments = made.parse_args()
    directory = RunDirectory(arguments.run.absolute())
    config = read(directory.config)
    policy, ppm = checkpoints(directory, arguments.round - 1, config)
    if ppm is None:
        made.error("--round must be at least 2: the base model has no PPM")
    used = (config.problems.per_round or 0) * len(config.rounds)
    fresh = toy_problems(
        arguments.problems, config.run.seed, "train", config.toy.difficulties, config.toy.operations, used
    )
    by_id = {problem.id: problem for problem in fresh}
    fleet = Fleet(config, cluster.connect(config.cluster))
    base = replace(resolve_round(config, arguments.round), retry_trees=0, trees=1, escalation=())
    settings = [(ValueKind.ppm, base.rollouts)]
    settings += [(ValueKind.terminal, max(1, round(base.rollouts * factor))) for factor in (0.75, 1.0, 1.5)]
    rows: list[dict[str, Any]] = []
    solved: dict[str, dict[str, bool]] = {}
    try:
        fleet.load(policy, ppm)
        for value, rollouts in settings:
            plan = replace(base, value=value, rollouts=rollouts)
            trees, seconds = grow(config, fleet, plan, fresh, policy, ppm)
            name = f"{value.name}, {rollouts} rollouts"
            solved[name] = {tree.problem_id: tree.solved for tree in trees}
            pairs, quality = pair_quality(config, trees, by_id)
            share = interval([float(tree.solved) for tree in trees], 2000)
            first = solved[f"ppm, {base.rollouts} rollouts"]
            paired = interval([float(first[p]) - float(s) for p, s in solved[name].items()], 2000)
            rows.append(
                {
                    "setting": name,
                    "solved": share.value,
                    "ppm_minus_this": [paired.value, paired.low, paired.high],
                    "sampled_tokens": sum(tree.sampled_tokens for tree in trees),
                    "scored_tokens": sum(tree.scored_tokens for tree in trees),
                    "correct_trajectories": sum(bool(tree.correct[i]) for tree in trees for i in tree.terminals()),
                    "pairs": pairs,
                    "pairs_right_by_oracle": quality,
                    "seconds": seconds,
                }
            )
    finally:
        fleet.stop()
    show(rows, arguments.round, len(fresh))
    return finish({"round": arguments.round, "problems": len(fresh), "rows": rows}, [], arguments)


def show(rows: Sequence[dict[str, Any]], round_: int, problems: int) -> None:
    """Print the comparison."""
    table = Table(title=f"Search of round {round_} on {problems} fresh problems", title_justify="left")
    for column in ("setting", "solved", "PPM minus this", "tokens", "PPM tokens", "correct", "pairs", "right", "s"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        value, low, high = row["ppm_minus_this"]
        table.add_row(
            row["setting"],
            f"{row['solved']:.1%}",
            f"{value:+.1%} [{low:+.1%}, {high:+.1%}]",
            f"{row['sampled_tokens']:,}",
            f"{row['scored_tokens']:,}",
            str(row["correct_trajectories"]),
            str(row["pairs"]),
            f"{row['pairs_right_by_oracle']:.1%}",
            f"{row['seconds']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
