"""Kill anything, lose nothing: a small run is disturbed again and again and must end as an undisturbed one does.

    python -m benchmarks.chaos --kills 25 --seed 1 [--targets driver,engine,...] [--json FILE] [--check]

First a run is left alone. Then the same run is started in other directories and its processes are killed (SIGKILL) at
seeded moments spread over all its stages; a dead driver is started again by the same command. At the end all must
have the same trees (none twice), the same training rows, evaluations, and checkpoints with the same digests, and no
process may be left. Printed is what was killed when, and what each recovery cost.

Half of the kills are done to a run on this machine alone, whose Ray ends with its driver; the other half, with whole
nodes among them, to a run in a cluster of pretended nodes, which outlives drivers and replaces nodes it loses.

Engines are scripted (`benchmarks.scripted`), because sampling on a busy engine is not repeatable to the bit. With
`--vllm` they are vLLM's, and only what does not depend on samples is compared. Training is always real.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from benchmarks.chaos.outcome import damage, differences, outcome, resumptions
from benchmarks.chaos.plan import STAGES, TARGETS, Kill, Stage, plan_kills, works
from benchmarks.chaos.recipe import SCRIPTED, SERVED
from benchmarks.chaos.run import TWICE, Machines, Run, kill
from benchmarks.common import Goal, finish, parser

TRAINING = ("sft", "ppm")
NODES = 2
POLL_S = 0.03
CENSUS_S = 1.0
"""Between two looks at which processes there are, which costs CPU time."""
MENDING_S = 0.2
"""The same, while something that was killed is not back yet."""
RUN_TIMEOUT_S = 3600.0
SAID = {"engine": "policy engine", "ppm": "PPM engine", "verifier": "verifier", "shard": "shard actor",
        "evaluator": "evaluator", "board": "board"}  # fmt: skip
"""What the driver says is back."""
GOALS = [Goal(name, "at most", 0) for name in ("trees_twice", "faults", "processes_left", "kills_without_target")]
"""A kill that found nothing to kill has shown nothing."""


@dataclass(slots=True)
class _Mending:
    """What was killed, and how it is seen that it is made good."""

    kill: Kill
    since: float
    stage: Stage
    others: set[int]
    """Processes of its kind before."""
    log: int
    """Length of the log."""
    steps: int
    """How many of the training were logged."""

    def done(self, run: Run, stage: Stage | None) -> bool:
        """Whether the work goes on, or the stage was done without."""
        target = self.kill.target
        said = run.log()[self.log :]
        if target in ("driver", "interrupt"):
            return re.search(r"^(base model|round \d+): ", said, re.MULTILINE) is not None
        if stage != self.stage:
            return True
        if target in SAID:
            return re.search(rf"{SAID[target]}[^\n]* is back after", said) is not None
        if self.stage[0] in TRAINING:
            return len(run.steps(self.stage)) > self.steps
        if target == "node":
            return " is at work on node " in said
        return bool(set(run.candidates(target, self.stage)) - self.others)


def undisturbed(run: Run) -> dict[Stage, float]:
    """Wait for a run that is left alone. What each stage took: steps of a training, seconds otherwise."""
    taken: dict[Stage, float] = {}
    for stage, began, now in _stages(run, []):
        if stage is not None:
            taken[stage] = now - began
    if run.process.wait() != 0:
        raise SystemExit(f"the undisturbed run failed:\n{run.log()[-4000:]}")
    return taken | {stage: max(run.steps(stage)) for stage in STAGES if stage[0] in TRAINING}


def _share(run: Run, stage: Stage, passed_s: float, taken: Mapping[Stage, float]) -> float:
    """How much of a stage is behind."""
    behind = max(run.steps(stage), default=0) if stage[0] in TRAINING else passed_s
    return behind / taken.get(stage, 1.0)


def _stages(run: Run, mending: list[_Mending]) -> Iterator[tuple[Stage | None, float, float]]:
    """(stage, when it was seen to begin, now), again and again until the driver has ended; sees what is mended."""
    stage, began = run.stage(), time.monotonic()
    deadline, counted = began + RUN_TIMEOUT_S, 0.0
    while run.process.poll() is None:
        now = time.monotonic()
        if (found := run.stage()) != stage:
            stage, began = found, now
        if now > deadline:
            run.end()
            raise SystemExit(f"the run is not done after {RUN_TIMEOUT_S:.0f} s:\n{run.log()[-4000:]}")
        if now - counted > (MENDING_S if mending else CENSUS_S):
            run.tree()
            counted = now
            for each in [each for each in mending if each.done(run, stage)]:
                each.kill.recovered_s = round(now - each.since, 2)
                mending.remove(each)
        yield stage, began, now
        time.sleep(POLL_S)


def disturb(run: Run, kills: Sequence[Kill], seed: int, taken: Mapping[Stage, float]) -> list[str]:
    """Carry out the kills until the run is done; fills in what became of each. Returns what went wrong on the way."""
    rng, started, waiting = Random(seed), time.monotonic(), list(kills)
    mending: list[_Mending] = []
    faults: list[str] = []
    while True:
        again, idle = False, 0.0
        for stage, began, now in _stages(run, mending):
            if any(each.kill.target in ("driver", "interrupt") for each in mending):
                idle = now  # until the driver is at work again, nothing of the stage goes by
                continue
            passed_s = now - max(began, idle)
            if not waiting or stage is None or not waiting[0].due(stage, _share(run, stage, passed_s, taken)):
                continue
            if STAGES.index(stage) > waiting[0].place:
                late = waiting.pop(0)
                if works(late.target, stage):
                    late.stage, late.round = stage
                    waiting.insert(0, late)
                elif late.postpone(stage):
                    waiting.append(late)
                    waiting.sort(key=lambda k: (k.place, k.share))
                continue
            target = waiting[0].target
            found = run.candidates(target, stage)
            if not found:
                continue  # it is being started
            each = waiting.pop(0)
            mending.append(_Mending(each, now, stage, set(found), len(run.log()), len(run.steps(stage))))
            each.at_s, each.during = round(now - started, 2), f"{stage[0]} {stage[1]}"
            each.detail = kill(rng.choice(sorted(found)), target, rng)
            if target in ("driver", "interrupt"):
                again = True
                break
        status = run.process.wait()
        if not again:
            break
        if target == "interrupt":
            faults += _ended_well(run, each, now, status)
        run.start()
    if status != 0:
        raise SystemExit(f"the disturbed run failed:\n{run.log()[-6000:]}")
    return faults


def _ended_well(run: Run, each: Kill, asked: float, status: int) -> list[str]:
    """What is wrong with the end of an interrupted driver: its status, its lock, what it left."""
    lock = TWICE not in each.detail and (run.path / "lock.json").exists()  # who ends at once leaves a stale one
    each.detail += f", ended in {time.monotonic() - asked:.1f} s"
    faults = []
    if status != 130:
        faults.append(f"{each.detail} during {each.during}: exit status {status}")
    if lock:
        faults.append(f"{each.detail} during {each.during}: its lock is left")
    if left := run.left():
        faults.append(f"{each.detail} during {each.during}: processes {left} are left")
    return faults


def main(argv: Sequence[str]) -> int:
    """Run the comparison; returns the exit status."""
    if argv[:1] == ["--drive"]:
        from benchmarks.chaos.drive import drive

        return drive(argv[1], argv[2:])
    if argv[:1] == ["--machines"]:
        from benchmarks.chaos.machines import serve

        return serve(int(argv[1]), Path(argv[2]))
    made = parser("chaos", __doc__)
    made.add_argument("--kills", type=int, default=25)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    made.add_argument("--vllm", action="store_true", help="serve the models, instead of scripted answers")
    made.add_argument("--keep", type=Path, help="keep all run directories here")
    arguments = made.parse_args(argv)
    targets = arguments.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        made.error(f"unknown targets {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started is ended then
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        return _compare(arguments, targets, (arguments.keep or Path(directory)).absolute())


def _compare(arguments: argparse.Namespace, targets: Sequence[str], directory: Path) -> int:
    engines = "benchmarks.chaos.drive:served" if arguments.vllm else "benchmarks.scripted:engines"
    recipe = SERVED if arguments.vllm else SCRIPTED
    began = time.monotonic()
    quiet = Run(directory / "undisturbed", engines, recipe)
    try:
        taken = undisturbed(quiet)
    finally:
        quiet.end()
    quiet_s = time.monotonic() - began
    print(f"undisturbed: {quiet_s:.0f} s", flush=True)
    expected = outcome(quiet.path)
    kills = plan_kills(arguments.kills, arguments.seed, targets)
    in_cluster = [each for number, each in enumerate(kills) if each.target == "node" or number % 2]
    parts = {"alone": [each for each in kills if each not in in_cluster], "in a cluster": in_cluster}
    if "node" not in targets:
        parts = {"alone": kills}
    faults: list[str] = []
    twice = left = 0
    for name, own in parts.items():
        machines = Machines(NODES, directory / "machines") if name != "alone" else None
        began = time.monotonic()
        run = Run(directory / f"disturbed {name}", engines, recipe, machines)
        try:
            faults += [f"{name}: {fault}" for fault in disturb(run, own, arguments.seed, taken)]
            left += len(run.left())
        finally:
            run.end()
            if machines is not None:
                machines.end()
        found = outcome(run.path)
        faults += [f"{name}: {what} differs" for what in differences(expected, found, exact=not arguments.vllm)]
        faults += [f"{name}: {what} is damaged or left" for what in damage(run.path)]
        twice += sum(found[key] for key in found if key.startswith("trees twice"))
        print(f"disturbed, {name}: {time.monotonic() - began:.0f} s")
        for each in sorted(own, key=lambda each: each.at_s or math.inf):
            print(_line(each), flush=True)
        for resumed in resumptions(run.path):
            print(f"  resumed: {resumed}")
    print(f"verdict: {'the same' if not faults else 'NOT the same:'}")
    for fault in faults:
        print(f"  {fault}")
    record = {
        "kills": sum(each.at_s is not None for each in kills),
        "kills_without_target": sum(each.at_s is None for each in kills),
        "trees": sum(len(expected[key]) for key in expected if re.fullmatch(r"trees \d+", key)),
        "trees_twice": twice,
        "faults": len(faults),
        "processes_left": left,
        "undisturbed_s": quiet_s,
        "log": [asdict(each) for each in kills],
        "what": faults,
    }
    return finish(record, GOALS, arguments)


def _line(each: Kill) -> str:
    when = "nothing to kill" if each.at_s is None else f"at {each.at_s:7.1f} s during {each.during}"
    detail = f" ({each.detail})" if each.detail else ""
    cost = "" if each.recovered_s is None else f", {each.recovered_s:.1f} s to recover"
    return f"  {each.target:12} {when}{detail}{cost}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
