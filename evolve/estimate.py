"""What a configuration will take: trees, tokens, disk, placement and GPU-hours. Starts nothing.

An estimate rests on assumptions, and all of them are named in `Plan.assumptions`, with the arithmetic
in `RoundEstimate.arithmetic`: a user who knows better numbers can put them in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from evolve.checks import CPU_WORKERS
from evolve.config import resolve_round
from evolve.costs import (
    GPU_MEMORY_GIB,
    TRAINER_BYTES,
    TREE_BYTES_PER_NODE,
    TREE_BYTES_PER_TOKEN,
    cost_arithmetic,
    early_stop,
    generation_hours,
    reading_hours,
    statements,
    training_hours,
)
from evolve.placement import Layout, Need, Resources, amount, lay_out, shards, shortfalls, taken
from evolve.schema import Device, EngineConfig, EvolveConfig, Generator, Precision, ValueKind
from evolve.sizes import ModelSize, model_size
from evolve.types import RoundPlan

GIB = 2.0**30
UNSOLVED_BY_ROUND = (0.398, 0.334, 0.221, 0.097)
"""Share of problems without a correct trajectory after each round of rStar-Math (arXiv 2501.04519)."""
UNKNOWN_PROBLEMS = 100_000
"""Training problems assumed when the data set cannot be counted without the network."""


@dataclass(frozen=True)
class Text:
    """Assumed lengths: tokens of a question with its prompt and of a step, steps of a solution."""

    prompt: int
    step: int
    steps: int

    @property
    def solution(self) -> int:
        return self.prompt + self.step * self.steps


@dataclass(frozen=True)
class Shard:
    """What one engine group asks of one node, and where such groups fit."""

    stage: str
    policy_gpus: float
    ppm_gpus: float
    cpus: float
    weights_gib: float
    """Weights of the policy engine on each of its GPUs (or in memory)."""
    layout: Layout
    """Which nodes such groups go to."""

    @property
    def gpus(self) -> float:
        return self.policy_gpus + self.ppm_gpus

    @property
    def fits(self) -> int:
        """How many such groups the cluster holds."""
        return self.layout.placed


@dataclass(frozen=True)
class RoundEstimate:
    """What one round takes. Counts are expectations; `most_trees` is the upper bound."""

    plan: RoundPlan
    model: ModelSize
    shard: Shard
    problems: int
    trees: float
    most_trees: int
    rollouts: float
    candidates: float
    generated_tokens: float
    scored_tokens: float
    trained_tokens: float
    tree_bytes: float
    checkpoint_bytes: float
    hours: dict[str, float]
    """GPU-hours (core-hours without GPUs) by stage: search, sft, ppm, evaluate."""
    arithmetic: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All rounds, what they assume, and what this cluster lacks for them."""

    config: EvolveConfig
    resources: Resources
    unit: str
    """`GPU` or `core`: what `RoundEstimate.hours` counts hours of."""
    rounds: tuple[RoundEstimate, ...]
    trainer_workers: int | None
    """None: as many as there are GPUs, and there are none yet."""
    layouts: tuple[Layout, ...]
    """Where the search of each round (rounds that need the same share one) and the training go."""
    assumptions: tuple[str, ...]
    missing: tuple[str, ...]
    """What a run would fail for."""
    waits: tuple[str, ...]
    """What it would wait for, since nodes may be added to this cluster."""

    @property
    def hours(self) -> float:
        return sum(sum(estimate.hours.values()) for estimate in self.rounds)

    @property
    def disk_bytes(self) -> float:
        return sum(estimate.tree_bytes + estimate.checkpoint_bytes for estimate in self.rounds)


def plan(config: EvolveConfig, resources: Resources) -> Plan:
    """Estimate every round of a configuration that is to run: all, or `config.round` alone."""
    on_gpus = uses_gpus(config, resources)
    problems, test, text, assumptions = _scale(config)
    wanted = range(1, len(config.rounds) + 1) if config.round is None else (config.round,)
    rounds = tuple(_round(config, k, problems, test, text, resources) for k in wanted)
    workers = config.sft.workers
    if workers is None:
        workers = CPU_WORKERS if not on_gpus else int(resources.gpus) or None
    layouts = (*_search_layouts(rounds), _training_layout(config, resources, rounds, workers))
    sizes = dict.fromkeys((e.model.name, e.model.billions, e.model.source) for e in rounds)
    assumptions.extend(f"{name}: {billions} parameters ({source})" for name, billions, source in sizes)
    assumptions.extend(statements(config.ppm.form, UNSOLVED_BY_ROUND, on_gpus))
    lacking = tuple(_lacking(config, resources, rounds, layouts[-1], workers))
    return Plan(
        config,
        resources,
        "GPU" if on_gpus else "core",
        rounds,
        workers,
        layouts,
        tuple(assumptions),
        (*(() if resources.grows else lacking), *_impossible(config, rounds, workers)),
        lacking if resources.grows else (),
    )


def uses_gpus(config: EvolveConfig, resources: Resources) -> bool:
    """Whether engines and trainers run on GPUs."""
    if config.cluster.device is Device.auto:
        return resources.gpus > 0
    return config.cluster.device is Device.gpu


def expansions(rollouts: int, candidates: int, steps: int) -> int:
    """Expected node expansions of one tree.

    A rollout expands every new node on its way to the end of a solution of `steps` steps. Unvisited
    siblings come first, so rollout i leaves the known part of the tree after about
    1 + log_candidates(i - 1) steps.
    """
    total = steps
    for i in range(2, rollouts + 1):
        known = 1 + (math.floor(math.log(i - 1, candidates) + 1e-9) if candidates > 1 else i - 2)
        total += max(0, steps - known)
    return total


def _scale(config: EvolveConfig) -> tuple[int, int, Text, list[str]]:
    """Problems a round, held-out problems, lengths of texts, and what was assumed for them."""
    problems, assumptions = config.problems, []
    toy = problems.path == "toy"
    if toy:
        text = Text(prompt=50, step=20, steps=4)
        count: int | None = (problems.per_round or 0) * len(config.rounds)
    else:
        text = Text(prompt=150, step=60, steps=8)
        count = _count(problems.path)
    test = _count(problems.test_path) if problems.test_path else problems.test_size
    if count is None:
        count = problems.limit or UNKNOWN_PROBLEMS
        why = "problems.limit" if problems.limit else "a guess; set problems.limit"
        assumptions.append(f"{problems.path} cannot be read here: {count:,} problems assumed ({why})")
    elif not problems.test_path and not toy:
        count = max(0, count - problems.test_size)
    if test is None:
        test = problems.test_size
        assumptions.append(f"{problems.test_path} cannot be read here: {test:,} held-out problems assumed")
    if problems.limit is not None:
        count = min(count, problems.limit)
    if problems.per_round is not None:
        count = min(count, problems.per_round)
    assumptions.append(
        f"a prompt has {text.prompt} tokens, a step {text.step}, a solution {text.steps} steps: {text.solution} tokens"
    )
    return count, test, text, assumptions


def _count(path: str) -> int | None:
    """Rows of a local file; None where that would need the network or a whole data set."""
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(file).num_rows)
    return None


@dataclass(frozen=True)
class _Search:
    """What a round's search is expected to take."""

    trees: float
    most_trees: int
    rollouts: float
    candidates: float
    tokens: float
    arithmetic: tuple[str, ...]


def _round(config: EvolveConfig, k: int, problems: int, test: int, text: Text, resources: Resources) -> RoundEstimate:
    own = resolve_round(config, k)
    base = model_size(config.policy.model, config.toy)
    large = config.policy.bootstrap.model if own.generator is Generator.bootstrap else None
    model = base if large is None else model_size(large, config.toy)
    unsolved = UNSOLVED_BY_ROUND[min(k, len(UNSOLVED_BY_ROUND)) - 1]
    search = _search(own, problems, unsolved, text)
    scored = search.tokens if own.value is ValueKind.ppm else 0.0
    sft, ppm, pairs = _training_tokens(config, k, problems * (1 - unsolved), text)
    evaluated = _evaluation_tokens(config, test, text)
    on_gpus = uses_gpus(config, resources)
    hours = {
        "search": generation_hours(search.tokens, model, on_gpus) + reading_hours(scored, base, on_gpus),
        "sft": training_hours(sft, base, config.sft.gradient_checkpointing, on_gpus),
        "ppm": training_hours(ppm, base, config.ppm.gradient_checkpointing, on_gpus),
        "evaluate": generation_hours(evaluated, base, on_gpus) + reading_hours(evaluated, base, on_gpus),
    }
    weight_bytes = 2 if config.sft.precision is Precision.bf16 else 4
    arithmetic = (
        *search.arithmetic,
        *((f"scored by the PPM: {scored:,.0f} tokens, each once",) if scored else ()),
        f"training: SFT {sft:,.0f} tokens; PPM {pairs:,.0f} pairs, {ppm:,.0f} tokens",
        f"evaluation: {test:,} problems, {evaluated:,.0f} tokens",
        cost_arithmetic(search.tokens, model, sft + ppm, base, config.sft.gradient_checkpointing, on_gpus),
        f"trees on disk: {search.tokens:,.0f} x {TREE_BYTES_PER_TOKEN:.0f} + {search.candidates:,.0f} x "
        f"{TREE_BYTES_PER_NODE:.0f} bytes; checkpoints: 2 x {base.parameters:.3g} x "
        f"({weight_bytes} + {TRAINER_BYTES:.0f}) bytes",
    )
    return RoundEstimate(
        plan=own,
        model=model,
        shard=_shard(config, own, model, resources),
        problems=problems,
        trees=search.trees,
        most_trees=search.most_trees,
        rollouts=search.rollouts,
        candidates=search.candidates,
        generated_tokens=search.tokens,
        scored_tokens=scored,
        trained_tokens=sft + ppm,
        tree_bytes=search.tokens * TREE_BYTES_PER_TOKEN + search.candidates * TREE_BYTES_PER_NODE,
        checkpoint_bytes=2 * base.parameters * (weight_bytes + TRAINER_BYTES),
        hours=hours,
        arithmetic=arithmetic,
    )


def _search(own: RoundPlan, problems: int, unsolved: float, text: Text) -> _Search:
    first = [own.rollouts] * own.trees
    further = [own.rollouts] * own.retry_trees + list(own.escalation)
    per_first = [expansions(r, own.candidates, text.steps) for r in first]
    per_further = [expansions(r, own.candidates, text.steps) for r in further]
    trees = problems * (len(first) + unsolved * len(further))
    rollouts = problems * (sum(first) + unsolved * sum(further))
    nodes = problems * (sum(per_first) + unsolved * sum(per_further))
    candidates = nodes * own.candidates
    tokens = candidates * text.step
    most = problems * (len(first) + len(further))
    retried = f" + {unsolved:.1%} unsolved x {len(further)} further" if further else ""
    rolled = f" + {unsolved:.1%} x ({_sum(further)})" if further else ""
    expanded = f", {_sum(per_further)} more when unsolved" if further else ""
    arithmetic = (
        f"trees: {problems:,} problems x ({len(first)}{retried}) = {trees:,.0f}; at most {most:,}",
        f"rollouts: {problems:,} x ({_sum(first)}{rolled}) = {rollouts:,.0f}",
        f"candidates: {nodes:,.0f} expansions ({_sum(per_first)} a problem{expanded}) x {own.candidates} "
        f"= {candidates:,.0f}, each executed once",
        f"tokens: {candidates:,.0f} x {text.step} = {tokens:,.0f} generated",
        *early_stop(own.settled),
    )
    return _Search(trees, most, rollouts, candidates, tokens, arithmetic)


def _sum(numbers: list[int]) -> str:
    return " + ".join(map(str, numbers))


def _training_tokens(config: EvolveConfig, k: int, solved: float, text: Text) -> tuple[float, float, float]:
    """Tokens of the SFT and of the PPM's training over all epochs, and the PPM's pairs."""
    sft, ppm = config.sft, config.ppm
    sft_tokens = solved * (k if sft.pooled else 1) * sft.trajectories * text.solution * sft.epochs
    pairs = solved * (k if ppm.pooled else 1) * text.steps / 2 * ppm.positives * ppm.negatives
    return sft_tokens, pairs * 2 * text.solution / 2 * ppm.epochs, pairs


def _evaluation_tokens(config: EvolveConfig, test: int, text: Text) -> float:
    evaluate = config.evaluate
    steps = text.steps * (1 + evaluate.samples + evaluate.beam_width * evaluate.beam_candidates)
    if evaluate.search_rollouts:
        search = expansions(evaluate.search_rollouts, evaluate.search_candidates, text.steps)
        steps += search * evaluate.search_candidates
    return float(test * steps * text.step)


def _shard(config: EvolveConfig, own: RoundPlan, model: ModelSize, resources: Resources) -> Shard:
    on_gpus = uses_gpus(config, resources)
    bootstrap = own.generator is Generator.bootstrap and config.policy.bootstrap.model is not None
    engine = config.policy.bootstrap.engine if bootstrap else config.policy.engine
    guided = own.value is ValueKind.ppm
    policy_gpus = _gpus(engine) if on_gpus else 0.0
    ppm_gpus = _gpus(config.ppm.engine) if on_gpus and guided else 0.0
    cpus = config.cluster.verifier_cpus
    need = Need(cpus, policy_gpus + ppm_gpus)
    layout = shards(f"round {own.round}", resources.nodes, need, config.cluster.shards)
    weights = model.parameters * (2 if engine.precision is Precision.bf16 else 4) / engine.tensor_parallel / GIB
    return Shard(f"round {own.round} search", policy_gpus, ppm_gpus, cpus, weights, layout)


def _gpus(engine: EngineConfig) -> float:
    return max(engine.gpus, float(engine.tensor_parallel)) if engine.tensor_parallel > 1 else engine.gpus


def _search_layouts(rounds: tuple[RoundEstimate, ...]) -> list[Layout]:
    """One layout for all rounds in a row that need the same."""
    found: list[tuple[list[int], Layout]] = []
    for estimate in rounds:
        layout = estimate.shard.layout
        if found and found[-1][1].need == layout.need:
            found[-1][0].append(estimate.plan.round)
        else:
            found.append(([estimate.plan.round], layout))
    return [replace(layout, what=_named(numbers)) for numbers, layout in found]


def _named(rounds: list[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}-{rounds[-1]}"


def _training_layout(
    config: EvolveConfig, resources: Resources, rounds: tuple[RoundEstimate, ...], workers: int | None
) -> Layout:
    """On GPUs the engines give way to the trainers; on CPUs both are up, and shards come first."""
    on_gpus = uses_gpus(config, resources)
    nodes = resources.nodes
    if not on_gpus and rounds:
        shares = max((estimate.shard.layout for estimate in rounds), key=lambda layout: layout.need.cpus).shares
        nodes = tuple(taken(share.node, Need(config.cluster.verifier_cpus), share.groups) for share in shares)
    layout = lay_out("training", nodes, Need(config.sft.cpus_per_worker, float(on_gpus)), workers)
    own = tuple(replace(share, node=node) for share, node in zip(layout.shares, resources.nodes, strict=True))
    return replace(layout, shares=own)


def _lacking(
    config: EvolveConfig, resources: Resources, rounds: tuple[RoundEstimate, ...], training: Layout, workers: int | None
) -> Iterator[str]:
    """What this cluster has too little of, as more nodes would mend it."""
    for shard in (estimate.shard for estimate in rounds):
        if not shard.layout.complete:
            yield (
                f"{shard.stage}: a shard needs {amount(shard.layout.need)} on one node; shards that fit: "
                f"{shard.fits} of {shard.layout.wanted}. " + "; ".join(shortfalls(shard.layout))
            )
    if uses_gpus(config, resources) and workers is None:
        yield "training: at least 1 GPU is needed; set cluster.device=cpu to train on CPUs"
    if workers and not training.complete:
        yield (
            f"training: {training.wanted} workers of {amount(training.need)} each, room for {training.placed}. "
            + "; ".join(shortfalls(training))
        )


def _impossible(config: EvolveConfig, rounds: tuple[RoundEstimate, ...], workers: int | None) -> Iterator[str]:
    """What no further node mends."""
    room = GPU_MEMORY_GIB * config.policy.engine.gpu_memory_utilization
    for shard in (estimate.shard for estimate in rounds):
        if shard.policy_gpus and shard.weights_gib > room:
            yield (
                f"{shard.stage}: {shard.weights_gib:.0f} GiB of weights a GPU do not go into {room:.0f} GiB; "
                "raise tensor_parallel"
            )
    for name, batch in (("sft", config.sft.batch), ("ppm", config.ppm.batch)):
        if workers and batch % workers:
            yield f"{name}.batch={batch} cannot be shared evenly by {workers} trainer workers"
