"""What is killed when: seeded, in the order of the stages, and only where a target works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

ROUNDS = 2
Stage = tuple[str, int]
"""Name and round."""
STAGES: list[Stage] = [
    ("base", 0), ("search", 1), ("rows", 1), ("evaluation", 0), ("sft", 1), ("ppm", 1), ("evaluation", 1),
    ("search", 2), ("rows", 2), ("sft", 2), ("ppm", 2), ("evaluation", 2),
]  # fmt: skip
"""In the order in which the driver does them."""
TARGETS = {
    "driver": ("base", "search", "rows", "sft", "ppm", "evaluation"),
    "interrupt": ("search", "sft", "ppm", "evaluation"),
    "engine": ("search", "evaluation"),
    "ppm": ("search", "evaluation"),
    "verifier": ("search", "evaluation"),
    "supervisor": ("search", "evaluation"),
    "interpreter": ("search", "evaluation"),
    "shard": ("search",),
    "board": ("search",),
    "evaluator": ("evaluation",),
    "trainer": ("sft", "ppm"),
    "mailbox": ("sft", "ppm"),
    "node": ("search", "sft", "evaluation"),
}
"""What may be killed, and during which stages it works. `interrupt`: the driver by Ctrl-C or SIGTERM, and once more
at the next turn; `node`: a pretended node with everything on it."""


@dataclass(slots=True)
class Kill:
    """One kill: planned, and as it was carried out."""

    target: str
    stage: str
    round: int
    share: float
    """When: this share of the stage is behind, of a training's steps, or else of the time it takes undisturbed."""
    at_s: float | None = None
    """Seconds since the disturbed run began; None: there was nothing to kill."""
    during: str = ""
    detail: str = ""
    recovered_s: float | None = None
    """Until the work went on, the actor was healthy again, or the stage was done; None where the run ended before."""

    @property
    def place(self) -> int:
        """Place of its stage among `STAGES`."""
        return STAGES.index((self.stage, self.round))

    def due(self, stage: Stage, share: float) -> bool:
        """Whether it is time, with this share of a stage behind."""
        now = STAGES.index(stage)
        return now > self.place or (now == self.place and share >= self.share)

    def postpone(self, after: Stage) -> bool:
        """Move it to the next stage after `after` in which its target works; False when there is none."""
        later = [stage for stage in STAGES[STAGES.index(after) + 1 :] if works(self.target, stage)]
        if later:
            self.stage, self.round = later[0]
        return bool(later)


def works(target: str, stage: Stage) -> bool:
    """Whether a target works in a stage; the base model has no PPM, and the first search uses none."""
    return stage[0] in TARGETS[target] and not (target == "ppm" and stage in (("evaluation", 0), ("search", 1)))


def plan_kills(count: int, seed: int, targets: Sequence[str]) -> list[Kill]:
    """`count` kills in the order of the stages, each at a random moment of a stage in which its target works.

    Every other kill is the driver's, where it is among the targets, and the others take turns. Driver and interrupts
    go through all their stages; the others' stages are random.
    """
    rng = Random(seed)
    kills: list[Kill] = []
    for target in _turns(count, targets):
        fitting = [stage for stage in STAGES if works(target, stage)]
        if target in ("driver", "interrupt"):
            name, k = fitting[sum(kill.target == target for kill in kills) % len(fitting)]
        else:
            name, k = rng.choice(fitting)
        kills.append(Kill(target, name, k, 0.9 * rng.random()))
    return sorted(kills, key=lambda kill: (kill.place, kill.share))


def _turns(count: int, targets: Sequence[str]) -> list[str]:
    others = [target for target in targets if target != "driver"]
    if not others or len(others) == len(targets):
        return [targets[number % len(targets)] for number in range(count)]
    return ["driver" if number % 2 == 0 else others[number // 2 % len(others)] for number in range(count)]
