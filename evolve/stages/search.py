"""The search stage: grow a round's trees, with everything already grown left as it is."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from evolve.config import resolve_round
from evolve.files import entries, file_digest
from evolve.fleet import CLIENT_START_S, Checkpoint
from evolve.policy.formats import format_named
from evolve.policy.prompts import worked_examples
from evolve.problems import for_round
from evolve.progress import duration
from evolve.schema import EvolveConfig, Generator, ValueKind
from evolve.search.board import Progress, start_board
from evolve.search.budget import EscalatingBudget
from evolve.search.grown import Earlier, Summaries
from evolve.search.shard import SearchJob
from evolve.service import ServiceError, get
from evolve.stages.growing import Growing
from evolve.stages.run import Run, shared_model
from evolve.store.parts import PATTERN, Parts, damaged_parts, mended_parts, set_aside
from evolve.store.run import RoundDirectory, RunError
from evolve.types import Problem, RoundPlan, Sampling

POLL_S = 0.25
STATS_S = 5.0
SANDBOX_S = 120.0
PART_START_S = 0.5
"""For a board to read one part file: several times what 64 trees of a thousand nodes take from a disk."""


def grow_trees(run: Run, k: int) -> None:
    """Grow the trees of round `k` that are not in its part files yet."""
    directory = run.directory.round(k)
    if directory.finished("search") is not None and not _reopened(run, directory):
        return
    config, plan = run.config, resolve_round(run.config, k)
    problems = for_round(run.problems, k)
    started = time.monotonic()
    run.line.show(f"round {k}: starting engines", force=True)
    policy, engine = run.policy(k - 1), None
    if plan.generator is Generator.bootstrap and config.policy.bootstrap.model is not None:
        policy = shared_model(config.policy.bootstrap.model, None, run.directory.path / "bootstrap")
        engine = config.policy.bootstrap.engine
    ppm = run.ppm(k - 1) if plan.value is ValueKind.ppm else None
    run.fleet.load(policy, ppm, engine)
    sandboxes = _sandboxes(run, k)
    job = _search_job(run, plan, directory, policy, ppm, (engine or config.policy.engine).max_model_len)
    ids = frozenset(problem.id for problem in problems)
    growing = Growing(run.fleet, job, lambda parts: _board(run, plan, problems, directory, parts), ids)
    try:
        progress = _watch(run, k, growing, started)
    finally:
        growing.close()
    _check_infrastructure(run.config, progress)
    seconds = time.monotonic() - started
    parts = _parts(directory, progress)
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
    directory.record(
        "search", **asdict(progress), parts=parts, policy=policy.digest, sandboxes=sandboxes, seconds=seconds
    )
    if progress.infrastructure_failures:
        run.line.end(
            f"note: the sandbox or the grader failed {progress.infrastructure_failures} times; no label was made of "
            f"that, and the trees concerned have a note"
        )
    run.line.end(
        f"round {k}: {progress.trees} trees in {duration(seconds)}, {progress.solved} of {progress.problems} "
        f"problems solved"
    )


def _sandboxes(run: Run, k: int) -> list[dict[str, Any]]:
    """The layers that each shard's sandbox has and lacks; what no earlier round of the run lacked is shown."""
    refs = [group.verifier.call.remote("describe") for group in run.fleet.groups]
    try:
        found = get(refs, SANDBOX_S, "the verifiers to describe their sandboxes")
    except RayActorError:
        return []  # it is started again, and described in the next round
    earlier = [run.directory.round(j).finished("search") or {} for j in range(1, k)]
    known = {lack for search in earlier for sandbox in search.get("sandboxes", []) for lack in sandbox["missing"]}
    for lack in dict.fromkeys(lack for sandbox in found for lack in sandbox["missing"]):
        if lack not in known:
            run.line.end(f"note: the sandbox lacks a layer: {lack}")
    return found


def _search_job(
    run: Run, plan: RoundPlan, directory: RoundDirectory, policy: Checkpoint, ppm: Checkpoint | None, context: int
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
        context=context,
        concurrent_trees=config.search.concurrent_trees,
        concurrent_rollouts=config.search.concurrent_rollouts,
        tail_rollouts=config.search.tail_rollouts,
        trees=directory.trees,
        policy=policy.named,
        ppm=ppm.named if ppm else None,
    )


def few_shot(config: EvolveConfig) -> str:
    """Worked examples put before the question while a model not trained on the format grows the trees."""
    path = config.policy.bootstrap.few_shot
    if path is not None:
        return Path(path).read_text()
    if config.policy.model == "toy" and config.policy.bootstrap.model is None:
        return ""
    return worked_examples(format_named(config.policy.format))


def _board(
    run: Run, plan: RoundPlan, problems: tuple[Problem, ...], directory: RoundDirectory, parts: Parts
) -> tuple[Any, float]:
    """The round's board, knowing the trees that earlier runs made durable; and the seconds that its start may take."""
    directory.trees.mkdir(parents=True, exist_ok=True)
    finished = Summaries(directory.trees, tuple(parts.trees))
    earlier = None
    if plan.round > 1 and run.config.problems.per_round is None:  # then it has the same problems
        before = run.directory.round(plan.round - 1).trees
        earlier = Earlier(before, tuple(path.name for path in entries(before, PATTERN)))
    files = len(finished.parts) + (len(earlier.parts) if earlier else 0)
    budget, restarts = EscalatingBudget(plan), run.config.cluster.restarts
    board = start_board(run.config.run.name, budget, problems, finished, directory.trees, earlier, restarts)
    return board, CLIENT_START_S + files * PART_START_S


def _reopened(run: Run, directory: RoundDirectory) -> bool:
    """Whether a finished search must go on, because trees that are still needed were damaged since."""
    if directory.finished("rows") is not None:
        return False
    recorded = (directory.finished("search") or {})["parts"]
    damaged = damaged_parts(directory.trees, recorded)
    for name, reason in damaged.items():
        path = directory.trees / name
        run.line.end(f"{path}: {reason}; its trees are grown again")
        if path.exists():
            set_aside(path, reason)
    if damaged:
        directory.forget("search")
    return bool(damaged)


def _parts(directory: RoundDirectory, progress: Progress) -> dict[str, str]:
    """The digest of every part file, by name.

    Raises:
        RunError: they do not hold the trees that were counted.
    """
    parts = mended_parts(directory.trees)
    if parts.count != progress.trees:
        raise RunError(
            f"round {directory.number}: {progress.trees} trees were counted, and the files in {directory.trees} hold "
            f"{parts.count}. {' '.join(parts.notes)} Run the same command again: what is missing is grown again."
        )
    return {name: file_digest(directory.trees / name) for name in parts.trees}


def _watch(run: Run, k: int, growing: Growing, started: float) -> Progress:
    """Show progress until every tree is durable."""
    deadline = started + run.config.cluster.stage_timeout_s
    stats: dict[str, float] = {}
    before: dict[str, float] = {}
    while not growing.poll():
        now = time.monotonic()
        if now > deadline:
            raise ServiceError(f"round {k}: search is not done after cluster.stage_timeout_s; trees so far are safe")
        run.tell(growing.notes)
        if growing.latest is not None:
            _check_infrastructure(run.config, growing.latest)
            if now - stats.get("at", 0.0) > STATS_S:
                before, stats = stats, _fleet_stats(growing) | {"at": now}
            run.line.show(_search_line(k, growing.latest, before, stats, now - started))
        time.sleep(POLL_S)
    assert growing.latest is not None
    return growing.latest


def _fleet_stats(growing: Growing) -> dict[str, float]:
    """Counters summed over shards: tokens, occupancy (mean), executions."""
    all_stats = growing.stats()
    return {
        "tokens": sum(s["policy"]["generated_tokens"] for s in all_stats),
        "occupancy": sum(s["policy"]["occupancy"] for s in all_stats) / max(1, len(all_stats)),
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


def _check_infrastructure(config: EvolveConfig, progress: Progress) -> None:
    """Raises ServiceError when the sandbox and the grader have failed too often for the run to go on."""
    limit = config.verifier.max_infrastructure_failures
    failures, executions = progress.infrastructure_failures, progress.executions
    if failures > 20 and failures > limit * (executions + failures):
        raise ServiceError(
            f"{failures} of {executions + failures} executions failed for the sandbox's own reasons, more than "
            f"verifier.max_infrastructure_failures={limit:.1%}. No label was made of them. Check the machine with "
            f"`python -m evolve.verify --self-test`. Trees that are durable count again when the run is continued: "
            f"raise the limit to keep them as they are, or remove their part files to have them grown again."
        )
