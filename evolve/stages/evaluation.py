"""The evaluation stage, and what is shown after it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import ray

from evolve import report
from evolve.evaluate import EvalJob, record_from, table
from evolve.progress import duration
from evolve.service import ServiceError, get
from evolve.stages.run import Run
from evolve.store.files import publish_json

POLL_S = 1.0


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
        policy=(policy.path, policy.digest),
        ppm=(ppm.path, ppm.digest) if ppm else None,
        searched=frozenset(p.id for p in run.problems.test[: config.evaluate.search_problems]),
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


def show(run: Run, k: int) -> None:
    """Write `report.json` and print the tables of round `k`."""
    report.show_round(report.build(run.directory, run.config), k, run.console)


def show_all(run: Run) -> None:
    """Print the closing table."""
    report.show_run(report.build(run.directory, run.config), run.console)
    run.console.print(f"Everything is in {run.directory.path}; results in report.json, metrics in metrics.jsonl.")
