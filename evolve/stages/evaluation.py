"""The evaluation stage, and what is shown after it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from evolve import report
from evolve.evaluate import EvalJob, Record, record_from, table
from evolve.files import publish_rows
from evolve.fleet import Checkpoint, Fleet
from evolve.progress import ProgressLine, duration
from evolve.schema import EvolveConfig
from evolve.service import Question, ServiceError, get
from evolve.stages.run import Run
from evolve.store.records import RecordFile, Row
from evolve.types import Problem
from evolve.verify.service import GradingUnavailable

POLL_S = 0.25
PROGRESS_S = 2.0


def evaluate(run: Run, k: int) -> None:
    """Evaluate the policy and PPM of round `k` (0: the base model) on the held-out problems."""
    directory = run.directory.round(k)
    if directory.finished("evaluation") is not None:
        return
    started = time.monotonic()
    policy, ppm, problems = run.policy(k), run.ppm(k), run.problems.test
    job = _job(run.config, k, policy, ppm, problems)
    kept = RecordFile(directory.eval / "records.partial.jsonl", job.digest())
    records = measure(run.config, run.fleet, k, policy, ppm, problems, run.line, lambda: run.tell([]), kept)
    rows = [asdict(row) for row in table(records, run.config.evaluate.bootstrap_resamples)]
    directory.eval.mkdir(parents=True, exist_ok=True)
    publish_rows(directory.eval / "records.json", map(asdict, records))
    seconds = time.monotonic() - started
    skipped = sum(record.skipped for record in records)
    values: dict[str, Any] = {f"evaluation/{row['method']}": row["accuracy"]["value"] for row in rows}
    run.metrics.log(k, values | {"evaluation/seconds": seconds}, policy_digest=policy.digest)
    directory.record("evaluation", rows=rows, problems=len(records), skipped=skipped, seconds=seconds)
    kept.remove()
    run.line.end(f"{_name(k)}: evaluated in {duration(seconds)}")


@dataclass(slots=True)
class _Share:
    """Problems that one evaluator is at work on."""

    evaluator: Any
    problems: Sequence[Problem]
    heard: int = 0
    """How many records it has handed over."""
    question: Question = field(init=False)

    def __post_init__(self) -> None:
        self.question = Question(lambda: self.evaluator.finished.remote(self.heard), PROGRESS_S)

    def news(self) -> list[Row]:
        """Records that it has finished since it was last heard of; none of a dead one."""
        try:
            rows: list[Row] = self.question.poll(time.monotonic()) or []
        except RayActorError:
            return []
        self.heard += len(rows)
        return rows


def measure(
    config: EvolveConfig,
    fleet: Fleet,
    k: int,
    policy: Checkpoint,
    ppm: Checkpoint | None,
    problems: Sequence[Problem],
    line: ProgressLine,
    tell: Callable[[], None] = lambda: None,
    kept: RecordFile | None = None,
) -> list[Record]:
    """One record a problem, in their order, from all shards of a fleet, which is made to serve the checkpoints.

    The records are all in memory: about 10 kB a held-out problem with 64 samples, however large the rounds are.
    What a dead evaluator had not handed over is evaluated again. `tell` is called about once a second while this
    waits. `kept` holds the records that are there already, and takes those that come.

    Raises:
        ServiceError: not done within `cluster.stage_timeout_s`, or a service did not answer an evaluator.
    """
    deadline = time.monotonic() + config.cluster.stage_timeout_s
    fleet.load(policy, ppm)
    job = _job(config, k, policy, ppm, problems)
    rows = kept.open() if kept is not None else {}
    left = [problem for problem in problems if problem.id not in rows]
    waiting = deque(part for i in range(len(fleet.groups)) if (part := left[i :: len(fleet.groups)]))
    working: dict[Any, _Share] = {}
    dead: list[Any] = []

    def keep(found: list[Row]) -> None:
        new = {row["problem_id"]: row for row in found if row["problem_id"] not in rows}
        if kept is not None:
            kept.append(new.values())
        rows.update(new)

    while waiting or working:
        fleet.poll()
        tell()
        for share in working.values():
            keep(share.news())
        for ref in ray.wait(list(working), num_returns=len(working), timeout=0)[0] if working else []:
            share = working.pop(ref)
            try:
                keep(get(ref, 60, "an evaluator's records"))
            except (ServiceError, GradingUnavailable) as error:
                done = f"{len(rows)} of {len(problems)} problems are evaluated and kept"
                raise ServiceError(f"{_name(k)}: evaluation cannot go on: {error}; {done}") from error
            except RayTaskError:
                raise
            except RayActorError:
                ray.kill(share.evaluator)  # it may live, and only have been out of reach
                dead.append(share.evaluator)  # another is being started in its place
                waiting.append([problem for problem in share.problems if problem.id not in rows])
        busy = [*dead, *(share.evaluator for share in working.values())]
        for group in fleet.groups:
            if waiting and group.evaluator not in busy:
                share = _Share(group.evaluator, waiting.popleft())
                working[group.evaluator.evaluate.remote(share.problems, job)] = share
        line.show(f"{_name(k)}: evaluating, {len(rows)}/{len(problems)} problems")
        if time.monotonic() > deadline:
            raise ServiceError(f"{_name(k)}: evaluation is not done after cluster.stage_timeout_s")
        time.sleep(POLL_S)
    return [record_from(rows[problem.id]) for problem in problems]


def _name(k: int) -> str:
    return "base model" if k == 0 else f"round {k}"


def _job(
    config: EvolveConfig, k: int, policy: Checkpoint, ppm: Checkpoint | None, problems: Sequence[Problem]
) -> EvalJob:
    return EvalJob(
        round=k,
        run_seed=config.run.seed,
        format=config.policy.format,
        samples=config.evaluate.samples,
        temperature=config.evaluate.temperature,
        top_p=config.policy.top_p,
        max_tokens=config.evaluate.max_tokens,
        max_step_tokens=config.policy.max_step_tokens,
        max_depth=config.search.max_depth,
        context=config.policy.engine.max_model_len,
        concurrent=config.search.concurrent_trees,
        policy=policy.named,
        ppm=ppm.named if ppm else None,
        searched=frozenset(p.id for p in problems[: config.evaluate.search_problems]),
        beam_width=config.evaluate.beam_width,
        beam_candidates=config.evaluate.beam_candidates,
        search_rollouts=config.evaluate.search_rollouts,
        search_candidates=config.evaluate.search_candidates,
    )


def show(run: Run, k: int) -> None:
    """Write `report.json` and print the tables of round `k`."""
    report.show_round(report.build(run.directory, run.config), k, run.console)


def show_all(run: Run) -> None:
    """Print the closing table."""
    report.show_run(report.build(run.directory, run.config), run.console)
    run.console.print(f"Everything is in {run.directory.path}; results in report.json, metrics in metrics.jsonl.")
