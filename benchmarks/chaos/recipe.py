"""The smoke recipe, smaller, as arguments of the driver."""

_EITHER = (
    "conf=smoke", "wandb.mode=disabled", "toy.workers=1", "search.concurrent_trees=4", "sft.checkpoint_steps=4",
    "ppm.checkpoint_steps=4", "ppm.epochs=8", "evaluate.search_problems=12", "evaluate.samples=2",
    "verifier.supervisors=1", "cluster.restarts=99", "cluster.placement_timeout_s=1200",
)  # fmt: skip
"""Restarts are many because the kills are."""
_SCRIPTED = (
    *_EITHER, "toy.pretrain_steps=2", "toy.demonstrations=60", "toy.quoting_texts=60", "sft.replay=20",
)  # fmt: skip
"""For scripted engines the base model only has to be one."""
_TWO_ROUNDS = (
    "problems.per_round=60", "problems.test_size=24",
    "rounds=[{generator: bootstrap, value: terminal}, {generator: previous, value: ppm}]",
)  # fmt: skip

SCRIPTED = (*_SCRIPTED, *_TWO_ROUNDS, "cluster.shards=2")
"""Two rounds with every stage, for scripted engines."""
SCRIPTED_ROUND = (*_SCRIPTED, "round=1", "problems.per_round=30", "problems.test_size=8")
"""One round, smaller still; how many shards is left open."""
SERVED = (*_EITHER, *_TWO_ROUNDS, "cluster.shards=1", "cluster.device=cpu", "toy.pretrain_steps=300")
"""Two rounds for vLLM, with a base model that solves some problems."""

ONE_A_NODE = ("policy.engine.gpus=0.55",)
"""With the PPM's 0.45 a whole GPU, and more than half of one without: a pretended node has room for one shard."""
