"""The stages of a round. Each does nothing when the round's manifest says that it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from evolve import cluster, report
from evolve.cluster import Checkpoint, Fleet
from evolve.config import differences, read, resolve_round, to_yaml
from evolve.evaluate import EvalJob, record_from, table
from evolve.learn.extract import Retokenise, begin_extraction
from evolve.learn.jobs import TrainJob, Workers
from evolve.learn.trainer import TrainerGroup
from evolve.policy.checkpoint import digest, resolve
from evolve.policy.formats import format_named
from evolve.problems import ProblemSet, for_round, load_problems
from evolve.progress import ProgressLine, duration
from evolve.schema import EvolveConfig, Generator, PPMConfig, SFTConfig, ValueKind
from evolve.search.board import Board, Progress, summarise
from evolve.search.budget import EscalatingBudget
from evolve.search.shard import SearchJob
from evolve.service import ServiceError, get
from evolve.store.files import file_digest, publish_file, publish_json
from evolve.store.run import Lock, RoundDirectory, RunDirectory, RunError
from evolve.store.trees import part_keys
from evolve.types import Problem, RoundPlan, Sampling

POLL_S = 1.0
STATS_S = 5.0


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


# --------------------------------------------------------------------------- opening


@contextmanager
def open_run(config: EvolveConfig) -> Iterator[Run]:
    """Check everything that can be checked, lock the run directory, then start Ray and yield the run.

    Raises:
        RunError, ProblemsError: before anything is started.
    """
    console, line = Console(), ProgressLine()
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
        base = _base_model(config, directory, line)
        fleet = Fleet(config, device)
        trainers = TrainerGroup(_workers(config, device), directory.path / "trainer")
        metrics = report.Metrics(directory, config)
        try:
            yield Run(config, directory, problems, base, fleet, trainers, metrics, line, console)
        finally:
            metrics.close()
            trainers.close()
            fleet.stop()
    finally:
        lock.release()


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


# --------------------------------------------------------------------------- search


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
    examples = _few_shot(config) if bootstrap else ""
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
        policy_digest=policy.digest,
        ppm_digest=ppm.digest if ppm else "",
    )


def _few_shot(config: EvolveConfig) -> str:
    """Worked examples put before the question while a model not trained on the format grows the trees."""
    path = config.policy.bootstrap.few_shot
    if path is not None:
        return Path(path).read_text()
    if config.policy.model == "toy" and config.policy.bootstrap.model is None:
        return ""
    from evolve.policy.prompts import examples

    return examples(config.policy.format)


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


# --------------------------------------------------------------------------- learning


def extract_rows(run: Run, k: int) -> None:
    """Select the trajectories and mine the step pairs of round `k`.

    Raises:
        RunError: there is nothing to learn from.
    """
    directory = run.directory.round(k)
    if directory.finished("rows") is not None:
        return
    config, plan = run.config, resolve_round(run.config, k)
    problems = for_round(run.problems, k)
    search = directory.finished("search") or {}
    retokenise = None
    if plan.generator is Generator.bootstrap and _few_shot(config):
        retokenise = Retokenise(
            tokenizer=run.base.path,
            format=config.policy.format,
            questions={problem.id: problem.question for problem in problems},
            same_tokenizer=config.policy.bootstrap.model is None,
        )
    reference = begin_extraction(
        [directory.trees / name for name in search["parts"]],
        directory.sft / "rows.parquet",
        directory.ppm / "rows.parquet",
        config.sft,
        config.ppm,
        frozenset(problem.id for problem in problems if problem.synthetic),
        retokenise,
    )
    counts = get(reference, config.cluster.stage_timeout_s, "the extraction of training rows")
    if not counts["sft"]["kept"]:
        raise RunError(
            f"round {k}: {search['problems']} problems were searched and none has a correct trajectory, so there is "
            f"nothing to learn from. The trees are kept in {directory.trees}. Use easier problems, more search "
            f"(search.rollouts, search.candidates, search.escalation), or a stronger model for round 1 "
            f"(policy.bootstrap.model)."
        )
    if not counts["ppm"]["pairs"]:
        raise RunError(
            f"round {k}: no node has both a better and a worse candidate, so the PPM has no pair to learn from. Use "
            f"more search.rollouts or search.candidates, a higher search.exploration, or a higher ppm.negative_q."
        )
    directory.record("rows", **counts)


def train(run: Run, k: int) -> None:
    """Fine-tune the policy of round `k` from the base model, then its PPM from that policy."""
    directory = run.directory.round(k)
    config = run.config
    stages: dict[str, tuple[str, SFTConfig | PPMConfig]] = {
        "sft": (run.base.path, config.sft),
        "ppm": (str(directory.sft / "checkpoint"), config.ppm),
    }
    missing = [stage for stage in stages if directory.finished(stage) is None]
    if not missing:
        return
    run.fleet.release()
    for stage in missing:
        initial, settings = stages[stage]
        started = time.monotonic()
        run.line.show(f"round {k}: {stage} training", force=True)
        job = TrainJob(
            config=settings,
            initial=initial,
            rows=tuple(str(path) for path in _row_files(run, k, stage)),
            output=str(directory.path / stage / "checkpoint"),
            seed=config.run.seed,
            metrics=str(directory.path / stage / "metrics.jsonl"),
        )
        [result] = run.trainers.fit([job], partial(_show_training, run, k))
        seconds = time.monotonic() - started
        found = digest(result.output)
        rows = (directory.finished("rows") or {}).get(stage, {})
        directory.record(stage, digest=found, rows=rows, metrics=dict(result.metrics), seconds=seconds)
        run.line.end(f"round {k}: {stage} trained in {duration(seconds)}, loss {result.metrics['loss']:.3f}")
        values = {f"{stage}/{name}": value for name, value in result.metrics.items()}
        run.metrics.log(k, values | {f"{stage}/seconds_total": seconds}, **{f"{stage}_digest": found})
    if run.fleet.device == "gpu":
        run.trainers.close()


def _row_files(run: Run, k: int, stage: str) -> list[Path]:
    """This round's rows, or those of all rounds so far, and the replay rows of the tiny world."""
    config = run.config.sft if stage == "sft" else run.config.ppm
    first = 1 if config.pooled else k
    files = [run.directory.round(j).path / stage / "rows.parquet" for j in range(first, k + 1)]
    if stage == "sft" and run.config.sft.replay:
        files.append(_replay_file(run))
    return files


def _replay_file(run: Run) -> Path:
    """Rows of the quoting task that keep the tiny model's copying alive."""
    from transformers import AutoTokenizer

    from evolve.learn import rows
    from evolve.toy.seed_model import replay_rows
    from evolve.types import Trajectory

    path = run.directory.path / "replay.parquet"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(run.base.path)
        found = replay_rows(
            run.config.sft.replay, run.config.run.seed, tokenizer, run.config.toy.difficulties, run.config.toy.operations
        )
        table_ = rows.to_table(
            [
                Trajectory(
                    problem_id=f"replay-{number}",
                    round=0,
                    tree=0,
                    node=0,
                    correct=True,
                    q=0.0,
                    prompt_ids=tuple(prompt),
                    token_ids=tuple(ids),
                    sampled=(True,) * len(ids),
                    text="",
                    answer="",
                    logprob=0.0,
                )
                for number, (prompt, ids) in enumerate(found)
            ],
            Trajectory,
        )
        rows.write(table_, path)
    return path


def _show_training(run: Run, k: int, job: TrainJob, metrics: Any) -> None:
    step, steps = metrics.get("step", 0), metrics.get("steps", 0)
    run.line.show(f"round {k}: {job.kind} training, step {step:.0f}/{steps:.0f}, loss {metrics.get('loss', 0.0):.3f}")


# --------------------------------------------------------------------------- evaluation


def evaluate(run: Run, k: int) -> None:
    """Evaluate the policy and PPM of round `k` (0: the base model) on the held-out problems."""
    directory = run.directory.round(k)
    if directory.finished("evaluation") is not None:
        return
    config, started = run.config, time.monotonic()
    policy, ppm = run.policy(k), run.ppm(k)
    run.fleet.load(policy, ppm)
    job = EvalJob(
        round=k,
        run_seed=config.run.seed,
        format=config.policy.format,
        samples=config.evaluate.samples,
        temperature=config.evaluate.temperature,
        top_p=config.policy.top_p,
        max_tokens=config.evaluate.max_tokens,
        max_step_tokens=config.policy.max_step_tokens,
        max_depth=config.search.max_depth,
        concurrent=config.search.concurrent_trees,
        with_ppm=ppm is not None,
        beam_width=config.evaluate.beam_width,
        beam_candidates=config.evaluate.beam_candidates,
        search_rollouts=config.evaluate.search_rollouts,
        search_candidates=config.evaluate.search_candidates,
    )
    records = [record_from(row) for row in _collect_records(run, k, job, started)]
    rows = [asdict(row) for row in table(records, config.evaluate.bootstrap_resamples)]
    directory.eval.mkdir(parents=True, exist_ok=True)
    publish_json(directory.eval / "records.json", [asdict(record) for record in records])
    seconds = time.monotonic() - started
    skipped = sum(record.skipped for record in records)
    directory.record("evaluation", rows=rows, problems=len(records), skipped=skipped, seconds=seconds)
    run.line.end(f"{'base model' if k == 0 else f'round {k}'}: evaluated in {duration(seconds)}")
    values: dict[str, Any] = {f"evaluation/{row['method']}": row["accuracy"]["value"] for row in rows}
    run.metrics.log(k, values | {"evaluation/seconds": seconds}, policy_digest=policy.digest)


def _collect_records(run: Run, k: int, job: EvalJob, started: float) -> list[dict[str, Any]]:
    groups, problems = run.fleet.groups, run.problems.test
    pending = [g.evaluator.evaluate.remote(problems[i :: len(groups)], job) for i, g in enumerate(groups)]
    refs, deadline = list(pending), started + run.config.cluster.stage_timeout_s
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
        done = sum(get([g.evaluator.done.remote() for g in groups], 60, "the evaluators' progress"))
        name = "base model" if k == 0 else f"round {k}"
        run.line.show(f"{name}: evaluating, {done}/{len(problems)} problems")
        if time.monotonic() > deadline:
            raise ServiceError(f"round {k}: evaluation is not done after cluster.stage_timeout_s")
    return [row for rows in get(refs, 60, "the evaluators' records") for row in rows]


# --------------------------------------------------------------------------- reporting


def show(run: Run, k: int) -> None:
    """Write `report.json` and print the tables of round `k`."""
    report.show_round(report.build(run.directory, run.config), k, run.console)


def show_all(run: Run) -> None:
    """Print the closing table."""
    report.show_run(report.build(run.directory, run.config), run.console)
    run.console.print(f"Everything is in {run.directory.path}; results in report.json, metrics in metrics.jsonl.")
