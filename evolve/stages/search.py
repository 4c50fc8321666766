"""The search stage: grow a round's trees, with everything already grown left as it is."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from evolve.cluster import Checkpoint
from evolve.config import resolve_round
from evolve.policy.checkpoint import digest, resolve
from evolve.policy.formats import format_named
from evolve.policy.prompts import worked_examples
from evolve.problems import for_round
from evolve.progress import duration
from evolve.schema import EvolveConfig, Generator, ValueKind
from evolve.search.board import Board, Progress, summarise
from evolve.search.budget import EscalatingBudget
from evolve.search.shard import SearchJob
from evolve.service import ServiceError, get
from evolve.stages.run import Run
from evolve.store.files import file_digest
from evolve.store.run import RoundDirectory
from evolve.store.trees import part_keys
from evolve.types import Problem, RoundPlan, Sampling

POLL_S = 1.0
STATS_S = 5.0


def grow_trees(run: Run, k: int) -> None:
    """Grow the trees of round `k` that are not in its part files yet."""
    directory = run.directory.round(k)
    if directory.finished("search") is not None:
        return
    config, plan = run.config, resolve_round(run.config, k)
    problems = for_round(run.problems, k)
    started = time.monotonic()
    run.line.show(f"round {k}: starting engines", force=True)
    policy, engine = run.policy(k - 1), None
    if plan.generator is Generator.bootstrap and config.policy.bootstrap.model is not None:
        path = resolve(config.policy.bootstrap.model)
        policy, engine = Checkpoint(path, digest(path)), config.policy.bootstrap.engine
    ppm = run.ppm(k - 1) if plan.value is ValueKind.ppm else None
    run.fleet.load(policy, ppm, engine)
    job = _search_job(run, plan, directory, policy, ppm)
    board = _board(plan, problems, directory)
    growing = [group.shard.grow.remote(job, board) for group in run.fleet.groups]
    progress = _watch(run, k, board, growing, started)
    seconds = time.monotonic() - started
    parts = {path.name: file_digest(path) for path in sorted(directory.trees.glob("part-*.parquet"))}
    directory.record("search", **asdict(progress), parts=parts, policy=policy.digest, seconds=seconds)
    ray.kill(board)
    run.line.end(
        f"round {k}: {progress.trees} trees in {duration(seconds)}, {progress.solved} of {progress.problems} "
        f"problems solved"
    )
    run.metrics.log(
        k,
        {
            "search/coverage": progress.solved / progress.problems,
            "search/trees": progress.trees,
            "search/tokens": progress.sampled_tokens,
            "search/seconds": seconds,
            "search/infrastructure_failures": progress.infrastructure_failures,
        },
        policy_digest=policy.digest,
    )


def _search_job(
    run: Run, plan: RoundPlan, directory: RoundDirectory, policy: Checkpoint, ppm: Checkpoint | None
) -> SearchJob:
    config = run.config
    bootstrap = plan.generator is Generator.bootstrap
    examples = few_shot(config) if bootstrap else ""
    fmt = format_named(config.policy.format)
    sampling = Sampling(config.policy.temperature, config.policy.top_p, config.policy.max_step_tokens, fmt.stop)
    return SearchJob(
        plan=plan,
        run_seed=config.run.seed,
        format=config.policy.format,
        few_shot=examples,
        sampling=sampling,
        max_depth=config.search.max_depth,
        concurrent_trees=config.search.concurrent_trees,
        concurrent_rollouts=config.search.concurrent_rollouts,
        trees=directory.trees,
        policy=(policy.path, policy.digest),
        ppm=(ppm.path, ppm.digest) if ppm else None,
    )


def few_shot(config: EvolveConfig) -> str:
    """Worked examples put before the question while a model not trained on the format grows the trees."""
    path = config.policy.bootstrap.few_shot
    if path is not None:
        return Path(path).read_text()
    if config.policy.model == "toy" and config.policy.bootstrap.model is None:
        return ""
    return worked_examples(format_named(config.policy.format))


def _board(plan: RoundPlan, problems: tuple[Problem, ...], directory: RoundDirectory) -> Any:
    """The round's board, knowing the trees that earlier runs made durable."""
    directory.trees.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in directory.trees.glob("part-*.parquet"))
    parts = {key: name for name in names for key in part_keys(directory.trees / name)}
    finished = summarise(directory.trees, names)
    return (
        ray.remote(Board)
        .options(num_cpus=0, max_concurrency=16)
        .remote(EscalatingBudget(plan), problems, finished, parts, directory.trees)
    )


def _watch(run: Run, k: int, board: Any, growing: list[Any], started: float) -> Progress:
    """Show progress until every shard is done; fail when one fails."""
    deadline = started + run.config.cluster.stage_timeout_s
    pending, stats_at = list(growing), 0.0
    stats: dict[str, float] = {}
    before: dict[str, float] = {}
    while True:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S) if pending else ([], [])
        for ref in done:
            get(ref, 60, "a shard's result")
        progress: Progress = get(board.progress.remote(), 60, "the board's progress")
        if progress.failure:
            raise ServiceError(f"round {k}: {progress.failure}")
        _check_infrastructure(run, progress)
        if not pending:
            return progress
        now = time.monotonic()
        if now > deadline:
            raise ServiceError(f"round {k}: search is not done after cluster.stage_timeout_s; trees so far are safe")
        if now - stats_at > STATS_S:
            before, stats = stats, _fleet_stats(run) | {"at": now}
            stats_at = now
        run.line.show(_search_line(k, progress, before, stats, now - started))


def _fleet_stats(run: Run) -> dict[str, float]:
    """Counters summed over shards: tokens, occupancy (mean), executions."""
    all_stats = get([group.shard.stats.remote() for group in run.fleet.groups], 60, "the shards' statistics")
    return {
        "tokens": sum(s["policy"]["generated_tokens"] for s in all_stats),
        "occupancy": sum(s["policy"]["occupancy"] for s in all_stats) / len(all_stats),
        "executions": sum(s["verifier"].get("executions", 0.0) for s in all_stats),
    }


def _search_line(k: int, progress: Progress, before: dict[str, float], stats: dict[str, float], elapsed: float) -> str:
    parts = [
        f"round {k}: {progress.trees} trees, {progress.settled}/{progress.problems} problems settled, "
        f"{progress.solved} solved"
    ]
    if before and stats["at"] > before["at"]:
        span = stats["at"] - before["at"]
        parts.append(f"{(stats['tokens'] - before['tokens']) / span:,.0f} tokens/s")
        parts.append(f"engine {stats['occupancy']:.0%} full")
        parts.append(f"{(stats['executions'] - before['executions']) / span:,.0f} executions/s")
    if 0 < progress.settled < progress.problems:
        left = elapsed / progress.settled * (progress.problems - progress.settled)
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


def _check_infrastructure(run: Run, progress: Progress) -> None:
    limit = run.config.verifier.max_infrastructure_failures
    failures, executions = progress.infrastructure_failures, progress.executions
    if failures > 20 and failures > limit * (executions + failures):
        raise ServiceError(
            f"{failures} of {executions + failures} executions failed for the sandbox's own reasons, more than "
            f"verifier.max_infrastructure_failures={limit:.1%}. No label was made of them. Check the machine with "
            f"`python -m evolve.verify --self-test`."
        )
