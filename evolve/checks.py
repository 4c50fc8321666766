"""Which values and combinations of a configuration are impossible, and how to mend them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve.remote import holds_secret, is_uri
from evolve.schema import (
    Device,
    EngineConfig,
    EvolveConfig,
    Generator,
    RoundConfig,
    TrainConfig,
    ValueKind,
    VerifierConfig,
)

FORMATS = ("code", "printed")
SCHEDULES = ("linear", "cosine")
TOY_HEADS = 4
"""Attention heads of the tiny world's model."""
RAY_PACKAGES = "working_dir_files"
"""Directory of a Ray session under which `ray job submit --working-dir` is unpacked."""
OUTPUT_BYTES_MOST = 24 * 1024
"""Largest `verifier.output_bytes`: JSON may take six bytes for one, and a result must fit one packet."""
CPU_WORKERS = 2
"""Trainer workers where `workers` is null and there are no GPUs."""


@dataclass(frozen=True)
class Finding:
    """One impossible value or combination: the key to change, what is wrong, how to mend it."""

    key: str
    what: str
    mend: str


_AT_LEAST: dict[str, float] = {
    "run.seed": 0,
    "problems.limit": 1,
    "problems.per_round": 1,
    "problems.test_size": 1,
    "toy.demonstrations": 1,
    "toy.quoting_texts": 0,
    "toy.pretrain_steps": 1,
    "toy.tokens_per_step": 1,
    "toy.layers": 1,
    "toy.workers": 1,
    "policy.max_step_tokens": 1,
    "search.rollouts": 1,
    "search.candidates": 1,
    "search.exploration": 0,
    "search.max_depth": 1,
    "search.trees": 1,
    "search.retry_trees": 0,
    "search.concurrent_trees": 1,
    "search.concurrent_rollouts": 1,
    "search.tail_rollouts": 1,
    "search.settled": 1,
    "sft.trajectories": 1,
    "sft.replay": 0,
    "sft.synthetic_min_correct": 0,
    "ppm.anchor": 0,
    "ppm.positives": 1,
    "ppm.negatives": 1,
    "ppm.validation_share": 0,
    "evaluate.samples": 1,
    "evaluate.max_tokens": 1,
    "evaluate.beam_width": 1,
    "evaluate.beam_candidates": 1,
    "evaluate.search_rollouts": 0,
    "evaluate.search_candidates": 1,
    "evaluate.bootstrap_resamples": 100,
    "cluster.shards": 1,
    "cluster.verifier_cpus": 0,
    "cluster.restarts": 0,
}
_ABOVE_ZERO = (
    "policy.temperature",
    "policy.top_p",
    "ppm.beta",
    "ppm.score_scale",
    "evaluate.temperature",
    "cluster.placement_timeout_s",
    "cluster.stage_timeout_s",
    "cluster.restart_window_s",
    "cluster.silence_s",
)
_AT_MOST: dict[str, float] = {
    "policy.top_p": 1,
    "sft.synthetic_min_correct": 1,
    "ppm.validation_share": 0.5,
}
_TRAIN_AT_LEAST: dict[str, float] = {
    "warmup_ratio": 0,
    "weight_decay": 0,
    "batch": 1,
    "max_length": 2,
    "workers": 1,
    "checkpoint_steps": 1,
    "zero_stage": 0,
}
_TRAIN_AT_MOST: dict[str, float] = {"warmup_ratio": 1, "zero_stage": 3}
_TRAIN_ABOVE_ZERO = ("epochs", "learning_rate", "max_grad_norm", "cpus_per_worker", "timeout_s")
_ENGINE_AT_LEAST: dict[str, float] = {"tensor_parallel": 1, "max_num_seqs": 1, "max_model_len": 2}
_ENGINE_ABOVE_ZERO = (
    "gpus",
    "gpu_memory_utilization",
    "cpu_kv_cache_gib",
    "start_timeout_s",
    "request_timeout_s",
)
_ROUND_AT_LEAST: dict[str, float] = {
    "rollouts": 1,
    "candidates": 1,
    "exploration": 0,
    "trees": 1,
    "retry_trees": 0,
    "settled": 1,
}


def findings(config: EvolveConfig) -> list[Finding]:
    """Everything that is impossible in a configuration, in the order of its keys."""
    found = [
        *_ranges(config, "", _AT_LEAST, _AT_MOST, _ABOVE_ZERO),
        *_problems(config),
        *_toy(config),
        *_policy(config),
        *_rounds(config),
        *verifier(config.verifier),
        *_training(config, "sft", config.sft),
        *_training(config, "ppm", config.ppm),
        *_ppm(config),
    ]
    for key, engine in engines(config).items():
        found.extend(_engine(key, engine))
    return found


def engines(config: EvolveConfig) -> dict[str, EngineConfig]:
    """The engines a configuration speaks of, by key."""
    return {
        "policy.engine": config.policy.engine,
        "policy.bootstrap.engine": config.policy.bootstrap.engine,
        "ppm.engine": config.ppm.engine,
    }


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _ranges(
    config: Any,
    prefix: str,
    at_least: dict[str, float],
    at_most: dict[str, float],
    above_zero: tuple[str, ...],
) -> Iterator[Finding]:
    for key, bound in at_least.items():
        value = _value(config, key)
        if value is not None and value < bound:
            yield Finding(prefix + key, f"is {value}", f"it must be at least {bound:g}")
    for key, bound in at_most.items():
        value = _value(config, key)
        if value > bound:
            yield Finding(prefix + key, f"is {value}", f"it must be at most {bound:g}")
    for key in above_zero:
        value = _value(config, key)
        if value <= 0:
            yield Finding(prefix + key, f"is {value}", "it must be greater than 0")


def _problems(config: EvolveConfig) -> Iterator[Finding]:
    problems = config.problems
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        yield Finding("run.name", f"{config.run.name!r} is no directory name", "give a plain name")
    if is_uri(config.run.dir):
        if holds_secret(config.run.dir):
            mend = "give the address alone; keys belong in each node's environment, ~/.aws and the like, or its role"
            yield Finding("run.dir", "holds a password or parameters, which would be shown and saved", mend)
    elif RAY_PACKAGES in Path(config.run.dir).absolute().parts:
        what = f"{config.run.dir} lies in the copy of the working directory that Ray keeps while this job runs"
        mend = "give a directory that lasts and all nodes share: run.dir=/shared/runs, or EVOLVE_RUNS on every node"
        yield Finding("run.dir", what, mend)
    if not problems.path:
        yield Finding("problems.path", "is empty", "give `toy`, a file, a directory or a hub name")
    if problems.path == "toy" and problems.per_round is None:
        mend = "give the number of fresh problems a round takes, e.g. 450"
        yield Finding("problems.per_round", "is null, but the tiny world has no fixed set of problems", mend)


def _toy(config: EvolveConfig) -> Iterator[Finding]:
    toy = config.toy
    if not toy.difficulties or not all(1 <= d <= 6 for d in toy.difficulties):
        yield Finding("toy.difficulties", f"is {toy.difficulties}", "give levels from 1 to 6, e.g. [1, 2, 3]")
    if not 4 <= toy.operations <= 12:
        yield Finding("toy.operations", f"is {toy.operations}", "it must be from 4 to 12")
    if toy.hidden_size < 1 or toy.hidden_size % (32 * TOY_HEADS):
        mend = f"it must be a multiple of {32 * TOY_HEADS}: {TOY_HEADS} heads of a size vLLM's CPU build has"
        yield Finding("toy.hidden_size", f"is {toy.hidden_size}", mend)


def _policy(config: EvolveConfig) -> Iterator[Finding]:
    policy = config.policy
    if policy.format not in FORMATS:
        yield Finding("policy.format", f"{policy.format!r} is unknown", f"formats: {', '.join(FORMATS)}")
    elif policy.model == "toy" and policy.format != "printed":
        yield Finding("policy.format", f"is {policy.format}, which the toy model never saw", "use printed")
    for key, model in {"policy.model": policy.model, "policy.bootstrap.model": policy.bootstrap.model or ""}.items():
        if is_uri(model):
            yield Finding(key, f"is {model}", "give a directory, or a hub name; a run in an object store keeps a copy")
    few_shot = policy.bootstrap.few_shot
    if few_shot is not None and not Path(few_shot).expanduser().is_file():
        mend = "give a text file, or null for the built-in examples"
        yield Finding("policy.bootstrap.few_shot", f"there is no file {few_shot}", mend)
    named = {"policy.engine": policy.engine}
    if policy.bootstrap.model is not None:
        named["policy.bootstrap.engine"] = policy.bootstrap.engine
    for key, engine in named.items():
        if policy.max_step_tokens >= engine.max_model_len:
            yield Finding(
                "policy.max_step_tokens",
                f"is {policy.max_step_tokens}, which leaves no room for a prompt in "
                f"{key}.max_model_len = {engine.max_model_len}",
                "lower the one or raise the other",
            )


def _rounds(config: EvolveConfig) -> Iterator[Finding]:
    if not config.rounds:
        yield Finding("rounds", "is empty", "list at least one, e.g. rounds: [{generator: bootstrap}]")
        return
    if config.round is not None and not 1 <= config.round <= len(config.rounds):
        mend = f"the recipe has rounds 1 to {len(config.rounds)}"
        yield Finding("round", f"there is no round {config.round}", mend)
    if any(rollouts < 1 for rollouts in config.search.escalation):
        yield Finding("search.escalation", f"is {config.search.escalation}", "rollouts must be at least 1")
    for k, own in enumerate(config.rounds, start=1):
        yield from _round(config, k, own)


def _round(config: EvolveConfig, k: int, own: RoundConfig) -> Iterator[Finding]:
    for name, bound in _ROUND_AT_LEAST.items():
        value = getattr(own, name)
        if value is not None and value < bound:
            yield Finding(f"rounds.{k}.{name}", f"is {value}", f"it must be at least {bound:g}")
    if own.escalation is not None and any(rollouts < 1 for rollouts in own.escalation):
        yield Finding(f"rounds.{k}.escalation", f"is {own.escalation}", "rollouts must be at least 1")
    if k > 1:
        return
    if own.generator is Generator.previous:
        what = "is previous, but no policy has been trained before round 1"
        yield Finding("rounds.1.generator", what, "write generator: bootstrap")
    value = config.search.value if own.value is None else own.value
    if value is ValueKind.ppm:
        key = "search.value" if own.value is None else "rounds.1.value"
        what = "is ppm in round 1, but no PPM has been trained before it"
        yield Finding(key, what, "write value: terminal for round 1")


def verifier(config: VerifierConfig) -> Iterator[Finding]:
    """Limits of the sandbox that make no sense. The verifier itself refuses them too, for those who use it alone."""
    hour, day, mib = 3600, 86400, 1 << 20
    rules: list[tuple[str, bool, str]] = [
        ("supervisors", config.supervisors is None or 1 <= config.supervisors <= 1024, "null or from 1 to 1024"),
        ("cpu_s", 0.01 <= config.cpu_s <= hour, "from 0.01 to 3600 seconds"),
        ("wall_s", config.cpu_s <= config.wall_s <= day, f"from verifier.cpu_s = {config.cpu_s:g} to a day"),
        ("memory_mb", 256 <= config.memory_mb <= mib, "from 256 (sympy alone needs that) to 1048576"),
        ("output_bytes", 1 <= config.output_bytes <= OUTPUT_BYTES_MOST, f"from 1 to {OUTPUT_BYTES_MOST}"),
        ("snapshot_mb", 16 <= config.snapshot_mb <= 16 * mib, "from 16 (two snapshots with sympy) to 16777216"),
        ("grade_timeout_s", 0.01 <= config.grade_timeout_s <= hour, "from 0.01 to 3600 seconds"),
        ("queue", 1 <= config.queue <= mib, "from 1 to 1048576"),
        ("max_infrastructure_failures", 0 <= config.max_infrastructure_failures <= 1, "a share, from 0 to 1"),
    ]
    for key, holds, must in rules:
        if not holds:
            yield Finding(f"verifier.{key}", f"is {getattr(config, key)!r}", f"it must be {must}")


def _training(config: EvolveConfig, name: str, train: TrainConfig) -> Iterator[Finding]:
    yield from _ranges(train, f"{name}.", _TRAIN_AT_LEAST, _TRAIN_AT_MOST, _TRAIN_ABOVE_ZERO)
    if train.schedule not in SCHEDULES:
        mend = f"schedules: {', '.join(SCHEDULES)}"
        yield Finding(f"{name}.schedule", f"{train.schedule!r} is unknown", mend)
    if train.rows_tokens < train.max_length:
        yield Finding(
            f"{name}.rows_tokens",
            f"is {train.rows_tokens}, too short for a sequence of {name}.max_length = {train.max_length}",
            f"raise it to {train.max_length}",
        )
    workers = train.workers
    if workers is None and config.cluster.device is Device.cpu:
        workers = CPU_WORKERS
    if workers is not None and workers >= 1 and train.batch % workers:
        near = max(workers, round(train.batch / workers) * workers)
        what = f"is {train.batch}, which {workers} workers cannot share evenly"
        yield Finding(f"{name}.batch", what, f"e.g. {near}")


def _ppm(config: EvolveConfig) -> Iterator[Finding]:
    ppm = config.ppm
    if not -1 <= ppm.negative_q <= 1:
        yield Finding("ppm.negative_q", f"is {ppm.negative_q}", "Q-values lie in -1 to 1")
    if ppm.engine.max_model_len < config.policy.engine.max_model_len:
        what = (
            f"is {ppm.engine.max_model_len}, but the policy's prefixes grow to "
            f"policy.engine.max_model_len = {config.policy.engine.max_model_len}"
        )
        yield Finding("ppm.engine.max_model_len", what, "raise it to the policy's")


def _engine(key: str, engine: EngineConfig) -> Iterator[Finding]:
    yield from _ranges(engine, f"{key}.", _ENGINE_AT_LEAST, {"gpu_memory_utilization": 1}, _ENGINE_ABOVE_ZERO)
    if engine.tensor_parallel > 1 and engine.gpus < engine.tensor_parallel:
        what = f"is {engine.gpus:g}, but tensor_parallel = {engine.tensor_parallel} GPUs are asked for"
        yield Finding(f"{key}.gpus", what, f"raise it to {engine.tensor_parallel}")
    if engine.gpus > 1 and engine.gpus != int(engine.gpus):
        what = f"is {engine.gpus:g}; only a share of one GPU may be fractional"
        yield Finding(f"{key}.gpus", what, f"e.g. {int(engine.gpus) + 1}")
