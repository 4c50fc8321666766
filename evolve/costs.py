"""What a token costs: the assumptions on speed and size that `evolve.estimate` multiplies with."""

from __future__ import annotations

from collections.abc import Sequence

from evolve.schema import ScoreForm
from evolve.sizes import ModelSize

GPU_FLOPS = 312e12
"""Dense bf16 of one A100, FLOP/s: the GPU that GPU-hours are counted in."""
GPU_MEMORY_GIB = 80.0
GENERATION_SHARE, READING_SHARE, TRAINING_SHARE = 0.10, 0.40, 0.35
"""Share of `GPU_FLOPS` reached by decoding in large batches, by reading prompts, by training."""
CPU_FLOPS = 8e9
"""FLOP/s that one CPU core reaches on a tiny model, in generation and in training alike."""
FORWARD_FLOPS, TRAINING_FLOPS, CHECKPOINTED_FLOPS = 2, 6, 8
"""FLOPs a parameter and token: forward; forward and backward; with gradient checkpointing."""
TREE_BYTES_PER_TOKEN, TREE_BYTES_PER_NODE = 8.0, 60.0
"""A node in Parquet: ids, log-probabilities and text of its tokens; everything else of it. Compressed."""
TRAINER_BYTES = 14.0
"""Bytes a parameter of a trainer checkpoint: weights, fp32 master copy and two moments."""


def generation_hours(tokens: float, model: ModelSize, on_gpus: bool) -> float:
    """GPU- or core-hours of generating tokens."""
    rate = GPU_FLOPS * GENERATION_SHARE if on_gpus else CPU_FLOPS
    return tokens * FORWARD_FLOPS * model.active / rate / 3600


def reading_hours(tokens: float, model: ModelSize, on_gpus: bool) -> float:
    """GPU- or core-hours of scoring tokens: one forward pass."""
    rate = GPU_FLOPS * READING_SHARE if on_gpus else CPU_FLOPS
    return tokens * FORWARD_FLOPS * model.active / rate / 3600


def training_hours(tokens: float, model: ModelSize, checkpointing: bool, on_gpus: bool) -> float:
    """GPU- or core-hours of training on tokens."""
    rate = GPU_FLOPS * TRAINING_SHARE if on_gpus else CPU_FLOPS
    flops = CHECKPOINTED_FLOPS if checkpointing else TRAINING_FLOPS
    return tokens * flops * model.active / rate / 3600


def cost_arithmetic(
    generated: float, model: ModelSize, trained: float, base: ModelSize, checkpointing: bool, on_gpus: bool
) -> str:
    """How the hours of generation and training come about, in figures."""
    unit = "GPU" if on_gpus else "core"
    making = GPU_FLOPS * GENERATION_SHARE if on_gpus else CPU_FLOPS
    training = GPU_FLOPS * TRAINING_SHARE if on_gpus else CPU_FLOPS
    flops = CHECKPOINTED_FLOPS if checkpointing else TRAINING_FLOPS
    return (
        f"{unit}-hours: generation {generated:.3g} x {FORWARD_FLOPS} x {model.active:.3g} FLOPs / "
        f"({making:.3g} FLOP/s x 3600) = {generation_hours(generated, model, on_gpus):,.2f}; training "
        f"{trained:.3g} x {flops} x {base.active:.3g} / ({training:.3g} x 3600) = "
        f"{training_hours(trained, base, checkpointing, on_gpus):,.2f}"
    )


def early_stop(settled: int | None) -> tuple[str, ...]:
    """What `search.settled` means for the figures; nothing where it is not set."""
    if settled is None:
        return ()
    return (
        f"early stop (settled={settled}: a problem ends with {settled} correct and {settled} wrong solutions) is not "
        "taken off: how soon that is, is known only once problems are solved; so all of this is an upper bound",
    )


def statements(form: ScoreForm, unsolved: Sequence[float], on_gpus: bool) -> list[str]:
    """All assumptions on cost, in words."""
    if on_gpus:
        speed = (
            f"a GPU reaches {GENERATION_SHARE:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s (A100, bf16) when it "
            f"generates, {READING_SHARE:.0%} when it reads, {TRAINING_SHARE:.0%} when it trains; memory "
            f"{GPU_MEMORY_GIB:.0f} GiB"
        )
    else:
        speed = f"a CPU core reaches {CPU_FLOPS / 1e9:.0f} GFLOP/s; start-up of engines and trainers comes on top"
    flops = (
        f"a token costs {FORWARD_FLOPS} FLOPs an active parameter forward, {TRAINING_FLOPS} in training "
        f"({CHECKPOINTED_FLOPS} with gradient checkpointing); prefixes are cached and not read again"
    )
    shares = ", ".join(f"{share:.1%}" for share in unsolved)
    expected = f"unsolved after the first trees, by round: {shares} (rStar-Math's coverage); every candidate survives"
    scores = "a scalar head" if form is ScoreForm.head else "log-probabilities of steps"
    pairs = (
        f"PPM ({scores}): half of a solved problem's steps give positives x negatives pairs, each half a solution long"
    )
    disk = (
        f"trees take {TREE_BYTES_PER_TOKEN:.0f} bytes a token and {TREE_BYTES_PER_NODE:.0f} a node; policy and "
        f"PPM each leave their weights and a trainer checkpoint of {TRAINER_BYTES:.0f} bytes a parameter"
    )
    return [speed, flops, expected, pairs, disk]
