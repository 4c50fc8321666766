"""The learning stages: training rows from trees, then the policy, then its PPM."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from evolve.config import resolve_round
from evolve.files import Place, file_digest
from evolve.learn import rows
from evolve.learn.extract import Retokenise, RowsFiles, extract
from evolve.learn.jobs import TrainJob, partial_of
from evolve.policy.checkpoint import digest, resolve
from evolve.problems import for_round
from evolve.progress import duration
from evolve.schema import Generator, PPMConfig, SFTConfig
from evolve.stages.run import Run, untrained
from evolve.stages.search import few_shot
from evolve.store.run import RoundDirectory, RunError
from evolve.types import Trajectory


def extract_rows(run: Run, k: int) -> None:
    """Select the trajectories and mine the step pairs of round `k`.

    Raises:
        RunError: there is nothing to learn from.
    """
    directory = run.directory.round(k)
    if directory.finished("rows") is not None and not _changed_rows(directory):
        return
    config, plan = run.config, resolve_round(run.config, k)
    problems = for_round(run.problems, k)
    search = directory.finished("search") or {}
    retokenise = None
    if plan.generator is Generator.bootstrap and few_shot(config):
        retokenise = Retokenise(
            tokenizer=run.base.path,
            format=config.policy.format,
            questions={problem.id: problem.question for problem in problems},
            same_tokenizer=config.policy.bootstrap.model is None,
        )
    counts = extract(
        parts=[directory.trees / name for name in search["parts"]],
        problems=[problem.id for problem in problems],
        synthetic=frozenset(problem.id for problem in problems if problem.synthetic),
        rows_files=RowsFiles(
            directory.sft / "rows.parquet", directory.ppm / "rows.parquet", directory.path / "rows.partial"
        ),
        sft=config.sft,
        ppm=config.ppm,
        retokenise=retokenise,
        timeout_s=config.cluster.stage_timeout_s,
    )
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
    files = {name: file_digest(directory.path / name) for name in ("sft/rows.parquet", "ppm/rows.parquet")}
    directory.record("rows", **counts, files=files)


def _changed_rows(directory: RoundDirectory) -> list[Place]:
    """Row files of a round that are not what its manifest says; they are extracted anew from the round's trees."""
    files = (directory.finished("rows") or {}).get("files", {})
    paths = {directory.path / name: digest for name, digest in files.items()}
    return [path for path, digest in paths.items() if not path.exists() or file_digest(path) != digest]


def train(run: Run, k: int) -> None:
    """Fine-tune the policy of round `k` from the base model, then its PPM from that policy.

    Raises:
        RunError: the policy, made before, is not what it was; or an earlier round's rows are not.
    """
    directory = run.directory.round(k)
    config = run.config
    stages: dict[str, SFTConfig | PPMConfig] = {"sft": config.sft, "ppm": config.ppm}
    missing = untrained(directory)
    if not missing:
        return
    run.fleet.release()
    run.resize_trainers(partial_of(directory.path / missing[0] / "checkpoint"))
    for stage in missing:
        started = time.monotonic()
        run.line.show(f"round {k}: {stage} training", force=True)
        job = TrainJob(
            config=stages[stage],
            initial=(run.base if stage == "sft" else run.policy(k)).path,
            rows=tuple(str(path) for path in _row_files(run, k, stage)),
            output=str(directory.path / stage / "checkpoint"),
            seed=config.run.seed,
            metrics=str(directory.path / stage / "metrics.jsonl"),
        )
        [result] = run.trainers.fit([job], partial(_show_training, run, k), partial(_note, run, k, stage))
        seconds = time.monotonic() - started
        found = digest(result.output)
        counts = (directory.finished("rows") or {}).get(stage, {})
        values = {f"{stage}/{name}": value for name, value in result.metrics.items()}
        run.metrics.log(k, values | {f"{stage}/seconds_total": seconds}, **{f"{stage}_digest": found})
        directory.record(stage, digest=found, rows=counts, metrics=dict(result.metrics), seconds=seconds)
        run.line.end(f"round {k}: {stage} trained in {duration(seconds)}, loss {result.metrics['loss']:.3f}")
    if run.fleet.device == "gpu":
        run.trainers.close()


def _row_files(run: Run, k: int, stage: str) -> list[Place]:
    """This round's rows, or those of all rounds so far, and the replay rows of the tiny world."""
    config = run.config.sft if stage == "sft" else run.config.ppm
    first = 1 if config.pooled else k
    for j in range(first, k + 1):
        if changed := _changed_rows(run.directory.round(j)):
            raise RunError(
                f"{changed[0]} is missing or not what round {j}'s manifest says. Run with round={j} once: it is "
                f"extracted again from the round's trees, and nothing else of that round is done again."
            )
    files = [run.directory.round(j).path / stage / "rows.parquet" for j in range(first, k + 1)]
    if stage == "sft" and run.config.sft.replay:
        files.append(_replay_file(run))
    return files


def _replay_file(run: Run) -> Place:
    """Rows of the quoting task that keep the tiny model's copying alive."""
    from transformers import AutoTokenizer

    from evolve.toy.seed_model import replay_rows

    path = run.directory.path / "replay.parquet"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve(run.base.path))
        found = replay_rows(
            run.config.sft.replay,
            run.config.run.seed,
            tokenizer,
            run.config.toy.difficulties,
            run.config.toy.operations,
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


def _note(run: Run, k: int, stage: str, text: str) -> None:
    run.line.end(f"round {k}: {stage} training: {text}")
