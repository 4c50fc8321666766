"""The typed configuration schema: every key, its type, its default, and what it means.

Read by `evolve.config`; imports nothing heavy. `conf/default.yaml` lists the same keys for users.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class ValueKind(Enum):
    """How a new node's Q-value starts."""

    terminal = "terminal"
    """At 0; only graded terminals move it (rStar-Math rounds 1-2)."""
    ppm = "ppm"
    """At the PPM's score of its prefix (rStar-Math rounds 3-4)."""


class Rule(Enum):
    """How a rollout chooses among siblings."""

    uct = "uct"
    """Mean value and how seldom a step was tried (rStar-Math)."""
    puct = "puct"
    """The same, weighted by how likely the policy finds the step (AlphaZero, OpenR)."""


class Generator(Enum):
    """Which policy grows a round's trees."""

    bootstrap = "bootstrap"
    """`policy.bootstrap.model` with few-shot prompts; the base model where none is set."""
    previous = "previous"
    """The policy trained in the round before."""


class ScoreForm(Enum):
    """What a PPM's score of a step is."""

    head = "head"
    """A scalar head on the step's last token (rStar-Math)."""
    logprob = "logprob"
    """The model's summed log-probability of the step's tokens (kin to arXiv 2412.01981)."""


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    auto = "auto"
    """GPUs when the cluster has any, else CPUs."""
    cpu = "cpu"
    gpu = "gpu"


class WandbMode(Enum):
    auto = "auto"
    """Online with a key, offline without."""
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class RunConfig:
    name: str = "default"
    """Directory under `dir`, and the W&B group."""
    dir: str = "runs"
    """A directory, which all nodes of a cluster share, or a place in an object store: `s3://bucket/runs`."""
    seed: int = 0
    allow_changes: bool = False
    """Continue a run under a configuration that differs from the one it was started with, or with other problems or
    another base model under the same names."""


@dataclass
class FieldsConfig:
    """Which column of a data set holds what."""

    id: str = "id"
    """Rows without this column are numbered."""
    question: str = "problem"
    answer: str = "answer"
    difficulty: str = "difficulty"
    synthetic: str = "synthetic"


@dataclass
class ProblemsConfig:
    path: str = "toy"
    """`toy`, a .jsonl or .parquet file, a data set directory, or a Hugging Face hub name."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    limit: int | None = None
    """Use only the first so many training problems."""
    per_round: int | None = None
    """Fresh problems a round takes; null: every round takes all of them."""
    test_path: str | None = None
    """Held-out problems; null: `test_size` problems are split off `path`."""
    test_size: int = 400


@dataclass
class ToyConfig:
    """The tiny world; used where `problems.path` or `policy.model` is `toy`."""

    difficulties: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 2, 3, 3, 4, 5])
    """Numbers of events of the problems (beside the opening sentence), each entry as often as another."""
    operations: int = 12
    """How many kinds of event there are, simplest first (4 to 12)."""
    demonstrations: int = 2500
    quoting_texts: int = 4000
    pretrain_steps: int = 1400
    tokens_per_step: int = 1024
    hidden_size: int = 128
    layers: int = 3
    workers: int = 2
    """Processes that share the pre-training."""


@dataclass
class EngineConfig:
    """One vLLM engine."""

    tensor_parallel: int = 1
    gpus: float = 1.0
    """GPUs of one engine where there are GPUs; below 1: a share. At least `tensor_parallel` otherwise."""
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: float = 1.0
    """KV cache of vLLM's CPU build, GiB."""
    precision: Precision = Precision.bf16
    max_num_seqs: int = 256
    max_model_len: int = 4096
    """Prompt and solution together, tokens."""
    enforce_eager: bool = False
    start_timeout_s: float = 900.0
    request_timeout_s: float = 600.0


@dataclass
class BootstrapConfig:
    model: str | None = None
    """A larger model that grows round 1's trees; null: the base model."""
    few_shot: str | None = None
    """Text file put before the question for the bootstrap model; null: the built-in examples."""
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class PolicyConfig:
    model: str = "toy"
    """Base model: `toy`, a directory, or a hub name. Every round's SFT starts from it."""
    revision: str | None = None
    format: str = "code"
    """Step format: `code` (rStar-Math: code, output, boxed answer) or `printed` (output is the answer)."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    temperature: float = 1.0
    top_p: float = 1.0
    max_step_tokens: int = 256


@dataclass
class SearchConfig:
    rollouts: int = 16
    """Rollouts of a tree: passes of selection, expansion and backup that end at a leaf."""
    candidates: int = 8
    """Continuations sampled when a node is expanded."""
    exploration: float = 2.0
    """c of UCT."""
    max_depth: int = 16
    """Steps of a solution, the final answer included."""
    trees: int = 1
    """Trees of a problem, each with its own seed."""
    retry_trees: int = 1
    """Further trees for a problem without a correct trajectory."""
    escalation: list[int] = field(default_factory=list)
    """Rollouts of further trees for what is still unsolved, e.g. [64, 128]."""
    value: ValueKind = ValueKind.terminal
    concurrent_trees: int = 64
    """Trees that one shard grows at once."""
    concurrent_rollouts: int = 1
    """Rollouts of one tree in flight at once; above 1 a virtual loss keeps them apart, and a tree no longer comes out
    the same from the same seed, for it depends on which of them ends first."""
    tail_rollouts: int = 1
    """As `concurrent_rollouts`, for the last trees of a round, while a shard gets no further ones."""
    rule: Rule = Rule.uct
    settled: int | None = None
    """Stop a tree, and give its problem no further one, once so many distinct correct and so many distinct wrong
    solutions are known; null: never."""


@dataclass
class RoundConfig:
    """One round; null inherits from `search`."""

    generator: Generator = Generator.previous
    value: ValueKind | None = None
    rollouts: int | None = None
    candidates: int | None = None
    exploration: float | None = None
    trees: int | None = None
    retry_trees: int | None = None
    escalation: list[int] | None = None
    rule: Rule | None = None
    settled: int | None = None


@dataclass
class VerifierConfig:
    supervisors: int | None = None
    """Sandbox supervisors of one verifier actor; null: one a core of the node's share."""
    cpu_s: float = 5.0
    """CPU time of one step."""
    wall_s: float = 20.0
    """Wall time of one step, a cap against sleeping."""
    memory_mb: int = 700
    """Data memory of one interpreter."""
    output_bytes: int = 16384
    """What a step may print; the rest is cut and flagged."""
    snapshot_mb: int = 512
    """Live interpreter snapshots of one supervisor, together."""
    grade_timeout_s: float = 5.0
    queue: int = 1024
    """Requests waiting in one verifier actor before callers are held back."""
    max_infrastructure_failures: float = 0.01
    """Share of executions that may fail for the sandbox's own reasons before the run stops."""


@dataclass
class TrainConfig:
    """One training: SFT or PPM."""

    epochs: float = 2.0
    learning_rate: float = 7e-6
    schedule: str = "linear"
    """`linear` or `cosine` decay."""
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch: int = 128
    """SFT: sequences an optimiser step; PPM: pairs an optimiser step. All workers together."""
    max_length: int = 4096
    """Longest sequence, tokens; longer ones are dropped and counted, never cut."""
    rows_tokens: int = 4096
    """Packed row of one worker, tokens."""
    zero_stage: int = 2
    precision: Precision = Precision.bf16
    workers: int | None = None
    """Trainer workers; null: every GPU, at most `batch`, or 2 on CPUs. An interrupted training goes on with as many as
    it had."""
    cpus_per_worker: float = 1.0
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 200
    timeout_s: float = 86400.0


@dataclass
class SFTConfig(TrainConfig):
    trajectories: int = 2
    """Correct trajectories kept a problem, by highest mean Q."""
    pooled: bool = False
    """Train on the trajectories of all rounds so far, not on this round's alone."""
    synthetic_min_correct: float = 0.5
    """Synthetic problems with a smaller share of correct trajectories are dropped."""
    replay: int = 0
    """Texts of the tiny world's quoting task mixed in against forgetting."""


@dataclass
class PPMConfig(TrainConfig):
    form: ScoreForm = ScoreForm.head
    beta: float = 1.0
    """Scale of the score difference inside the loss."""
    anchor: float = 0.0
    """Weight of the anchor to the policy that a `logprob` PPM starts from."""
    positives: int = 2
    """Best siblings taken of a node."""
    negatives: int = 2
    """Worst siblings taken of a node."""
    negative_q: float = 0.0
    """A negative's Q must be at most this (and below every positive's)."""
    trajectory_pairs: bool = True
    """Pair whole trajectories for the final-answer step."""
    pooled: bool = False
    score_scale: float = 1.0
    """What a raw score is multiplied with before tanh."""
    validation_share: float = 0.05
    """Share of problems whose pairs are held out."""
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class EvaluateConfig:
    samples: int = 8
    """k of pass@k, of the vote and of best-of-N."""
    temperature: float = 1.0
    max_tokens: int = 2048
    """Tokens of a whole solution's code."""
    beam_width: int = 2
    beam_candidates: int = 4
    search_problems: int | None = None
    """Held-out problems that beam and PPM-guided search are run on; null: all."""
    search_rollouts: int = 0
    """Rollouts of PPM-guided search; 0 leaves it out."""
    search_candidates: int = 4
    bootstrap_resamples: int = 2000


@dataclass
class ClusterConfig:
    address: str | None = None
    """Ray address; null: the cluster this job runs in, or a new local one."""
    device: Device = Device.auto
    shards: int | None = None
    """Engine groups; null: as many as fit, and at least one. In a cluster that was joined work begins with those there
    is room for; the others wait for nodes, which an autoscaler adds: with null, on GPUs, up to its own maximum."""
    verifier_cpus: float = 1.0
    """CPUs of one shard's verifier."""
    placement_timeout_s: float = 1800.0
    """For a node with room for a shard to be there, or for all trainers to have started: an autoscaler may have to add
    nodes for them."""
    stage_timeout_s: float = 86400.0
    restarts: int = 3
    """Deaths of one actor within `restart_window_s` that are mended; one more stops the run."""
    restart_window_s: float = 3600.0
    silence_s: float = 300.0
    """An actor that has not answered for so long is killed and started again."""
    keep_engines: bool | None = None
    """Keep engines up while training; null: on CPUs only."""


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    project: str = "evolve"
    entity: str | None = None


@dataclass
class EvolveConfig:
    run: RunConfig = field(default_factory=RunConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rounds: list[RoundConfig] = field(default_factory=list)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    ppm: PPMConfig = field(default_factory=PPMConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    round: int | None = None
    """Run this round alone; null: every round that is not done."""
