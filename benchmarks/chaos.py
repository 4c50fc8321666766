"""Kill anything, lose nothing: a small run is disturbed again and again and must end as an undisturbed one does.

    python -m benchmarks.chaos --kills 25 --seed 1 [--targets driver,engine,...] [--json FILE] [--check]

First a run is left alone. Then the same run is started in another directory and its processes are killed (SIGKILL) at
seeded moments spread over all its stages; a dead driver is started again by the same command. At the end both must
have the same trees (none twice), the same training rows, and checkpoints with the same digests, and no process may be
left. Printed is what was killed when, and what each recovery cost.

Engines are scripted (`benchmarks.scripted`), because sampling on a busy engine is not repeatable to the bit; any other
pair can be named by `--engines module:function`, a function of the configuration. Training is real.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.common import Goal, finish, parser
from evolve.store.run import RunDirectory

RECIPE = (
    "conf=smoke", "wandb.mode=disabled", "problems.per_round=60", "problems.test_size=24", "toy.pretrain_steps=20",
    "toy.demonstrations=60", "toy.quoting_texts=60", "toy.workers=1", "search.concurrent_trees=8", "sft.replay=20",
    "sft.checkpoint_steps=4", "ppm.checkpoint_steps=4", "evaluate.search_problems=12", "evaluate.samples=2",
    "verifier.supervisors=1", "cluster.shards=2", "cluster.restarts=20", "cluster.placement_timeout_s=1200",
)  # fmt: skip
"""The smoke recipe, smaller; two rounds and every stage. Restarts are many because the kills are."""
ROUNDS = 2
STAGES = [
    ("base", 0), ("search", 1), ("rows", 1), ("evaluation", 0), ("sft", 1), ("ppm", 1), ("evaluation", 1),
    ("search", 2), ("rows", 2), ("sft", 2), ("ppm", 2), ("evaluation", 2),
]  # fmt: skip
"""Stages in the order in which the driver does them, with their rounds."""
TARGETS = {
    "driver": ("base", "search", "rows", "sft", "ppm", "evaluation"),
    "engine": ("search", "evaluation"),
    "ppm": ("evaluation",),
    "verifier": ("search", "evaluation"),
    "supervisor": ("search", "evaluation"),
    "interpreter": ("search", "evaluation"),
    "shard": ("search",),
    "board": ("search",),
    "evaluator": ("evaluation",),
    "trainer": ("sft", "ppm"),
    "mailbox": ("sft", "ppm"),
}
"""What may be killed, and during which stages it works."""
TITLES = {"shard": "ray::Shard", "board": "ray::Board", "evaluator": "ray::Evaluator", "mailbox": "ray::Mailbox",
          "trainer": "RayTrainWorker"}  # fmt: skip
"""What the titles of actors' processes contain."""
POLL_S = 0.1
CENSUS_S = 1.0
"""Between two looks at which processes there are, which costs CPU time."""
RUN_TIMEOUT_S = 3600.0
LEFT_S = 20.0
"""How long processes may take to end after their driver has."""
PIDS = "pids.json"


@dataclass(slots=True)
class Kill:
    """One kill: planned, and as it was carried out."""

    target: str
    stage: str
    round: int
    delay_s: float
    """From when the stage was seen to begin."""
    at_s: float | None = None
    """Seconds since the disturbed run began; None: there was nothing to kill."""
    during: str = ""
    recovered_s: float | None = None
    """Until the stage went on (driver), or the actor was healthy again; None where nothing says so."""


def plan_kills(count: int, seed: int, targets: Sequence[str], durations: Mapping[tuple[str, int], float]) -> list[Kill]:
    """`count` kills in the order of the stages; every target in turn, at a random moment of a random stage of its."""
    rng = Random(seed)
    kills = []
    for number in range(count):
        target = targets[number % len(targets)]
        name, k = rng.choice([stage for stage in STAGES if stage[0] in TARGETS[target]])
        if target == "ppm" and k == 0:  # the base model has none
            k = ROUNDS
        kills.append(Kill(target, name, k, rng.random() * 0.9 * durations.get((name, k), 1.0)))
    return sorted(kills, key=lambda kill: (STAGES.index((kill.stage, kill.round)), kill.delay_s))


def outcome(directory: Path) -> dict[str, Any]:
    """What must be equal: digests of every tree, of the rows and of the checkpoints, and the evaluations."""
    run = RunDirectory(directory)
    found: dict[str, Any] = {}
    for k in range(ROUNDS + 1):
        manifest = run.round(k).manifest()
        trees: dict[str, str] = {}
        roots = 0
        for name in sorted(manifest.get("search", {}).get("parts", {})):
            for row in pq.read_table(run.round(k).trees / name).to_pylist():
                key = f"{row['problem_id']}/{row['tree']}"
                trees[key] = _hash(trees.get(key, ""), row)
                roots += row["node"] == 0
        found[f"trees {k}"] = trees
        found[f"trees twice {k}"] = roots - len(trees)
        for stage in ("sft", "ppm"):
            rows = run.round(k).path / stage / "rows.parquet"
            found[f"{stage} rows {k}"] = _hash("", pq.read_table(rows).to_pylist()) if rows.exists() else ""
            found[f"{stage} checkpoint {k}"] = manifest.get(stage, {}).get("digest", "")
        found[f"evaluation {k}"] = manifest.get("evaluation", {}).get("rows")
    return found


def _hash(before: str, value: Any) -> str:
    return hashlib.sha256((before + json.dumps(value, sort_keys=True, default=str)).encode()).hexdigest()


class Driver:
    """The command under test in a process of its own, started again as often as it is killed."""

    def __init__(self, directory: Path, engines: str) -> None:
        self.run = directory / "smoke"
        self._command = [sys.executable, "-m", "benchmarks.chaos", "--drive", engines, *RECIPE, f"run.dir={directory}"]
        self._log = directory / "log.txt"
        directory.mkdir(parents=True)
        self.seen: dict[int, float] = {}
        """Every process that was seen below a driver, with its start time."""
        self.start()

    def start(self) -> None:
        """Type the command."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "RAY_ADDRESS"}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def log(self) -> str:
        """Everything said so far."""
        return self._log.read_text(errors="replace")

    def stage(self) -> tuple[str, int] | None:
        """The first stage that no manifest names; None when all are done."""
        directory = RunDirectory(self.run)
        return next((s for s in STAGES if directory.round(s[1]).finished(s[0]) is None), None)

    def tree(self) -> list[psutil.Process]:
        """The processes below the driver now."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for process in found:
            self.seen.setdefault(process.pid, process.create_time())
        return found

    def victim(self, target: str, rng: Random) -> int | None:
        """The process id of a target; None when there is none at work."""
        if target == "driver":
            return self.process.pid if self.process.poll() is None else None
        if target in ("engine", "ppm", "verifier"):
            try:
                pids = json.loads((self.run / PIDS).read_text())
            except (FileNotFoundError, ValueError):
                return None
            role = {"engine": "policy engine", "ppm": "PPM engine", "verifier": "verifier"}[target]
            alive = [pid for name, pid in pids.items() if name.startswith(role) and psutil.pid_exists(pid)]
        else:
            alive = [process.pid for process in self.tree() if _is(process, target)]
        return rng.choice(sorted(alive)) if alive else None

    def left(self) -> list[int]:
        """Processes of this run that outlived it, after giving them time to end."""
        deadline = time.monotonic() + LEFT_S
        while True:
            alive = [pid for pid, started in self.seen.items() if _alive(pid, started)]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.5)

    def end(self) -> None:
        """End the driver, if it still runs, in good order."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)


def _is(process: psutil.Process, target: str) -> bool:
    try:
        title, parents = " ".join(process.cmdline()), process.parents()
        if target == "supervisor":
            return "evolve.verify.supervisor" in title
        if target == "interpreter":
            return any("evolve.verify.supervisor" in " ".join(parent.cmdline()) for parent in parents)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return TITLES[target] in title


def _alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def undisturbed(driver: Driver) -> dict[tuple[str, int], float]:
    """Wait for a run that is left alone; how long each stage took, seconds."""
    durations: dict[tuple[str, int], float] = {}
    for stage, began, now in _stages(driver):
        durations[stage] = now - began
    if driver.process.wait() != 0:
        raise SystemExit(f"the undisturbed run failed:\n{driver.log()[-4000:]}")
    return durations


def _stages(driver: Driver) -> Iterator[tuple[tuple[str, int], float, float]]:
    """(stage, when it was seen to begin, now), again and again until the driver has ended."""
    stage, began = driver.stage(), time.monotonic()
    deadline, counted = began + RUN_TIMEOUT_S, 0.0
    while driver.process.poll() is None:
        if (found := driver.stage()) != stage:
            stage, began = found, time.monotonic()
        if time.monotonic() > deadline:
            driver.end()
            raise SystemExit(f"the run is not done after {RUN_TIMEOUT_S:.0f} s:\n{driver.log()[-4000:]}")
        if time.monotonic() - counted > CENSUS_S:
            driver.tree()
            counted = time.monotonic()
        if stage is not None:
            yield stage, began, time.monotonic()
        time.sleep(POLL_S)


def disturb(driver: Driver, kills: Sequence[Kill], seed: int) -> None:
    """Carry out the kills, in their order, until the run is done; fills in what became of each."""
    rng, started, waiting = Random(seed), time.monotonic(), list(kills)
    restarts = 0
    while True:
        for stage, began, now in _stages(driver):
            if not waiting or not _due(waiting[0], stage, now - began):
                continue
            pid = driver.victim(waiting[0].target, rng)
            missed = STAGES.index(stage) > STAGES.index((waiting[0].stage, waiting[0].round))
            if pid is None and not missed:
                continue  # it is being started
            kill = waiting.pop(0)
            if pid is None:
                continue
            os.kill(pid, signal.SIGKILL)
            kill.at_s, kill.during = round(now - started, 2), f"{stage[0]} {stage[1]}"
            if kill.target == "driver":
                driver.process.wait()
                driver.start()
                restarts += 1
                kill.recovered_s = _until_works(driver, now)
                break
        else:
            break
    if driver.process.wait() != 0:
        raise SystemExit(f"the disturbed run failed:\n{driver.log()[-6000:]}")
    _read_recoveries(driver.log(), kills)


def _due(kill: Kill, stage: tuple[str, int], passed_s: float) -> bool:
    planned, now = STAGES.index((kill.stage, kill.round)), STAGES.index(stage)
    return now > planned or (now == planned and passed_s >= kill.delay_s)


def _until_works(driver: Driver, killed: float) -> float | None:
    """Seconds from a driver's death until the one in its place is at work, which its log says."""
    length = len(driver.log())
    while driver.process.poll() is None and time.monotonic() - killed < RUN_TIMEOUT_S:
        if re.search(r"^(base model|round \d+): ", driver.log()[length:], re.MULTILINE):
            return round(time.monotonic() - killed, 2)
        time.sleep(POLL_S)
    return None


def _read_recoveries(log: str, kills: Sequence[Kill]) -> None:
    """What the driver itself measured: from an actor's death to its health."""
    roles = {"policy engine": "engine", "PPM engine": "ppm", "verifier": "verifier", "shard actor": "shard",
             "evaluator": "evaluator", "board": "board"}  # fmt: skip
    for role, seconds in re.findall(r"(policy engine|PPM engine|verifier|shard actor|evaluator|board)[^\n]*? is back "
                                    r"after ([\d.]+) s", log):  # fmt: skip
        for kill in kills:
            if kill.target == roles[role] and kill.at_s is not None and kill.recovered_s is None:
                kill.recovered_s = float(seconds)
                break


def drive(engines: str, arguments: Sequence[str]) -> int:
    """The driver's own main, with other engines, and with the process ids of its actors in a file."""
    from evolve import driver, stages

    module, _, function = engines.partition(":")
    make = getattr(importlib.import_module(module), function)
    original = stages.open_run

    @contextmanager
    def open_run(config: Any) -> Iterator[Any]:
        with original(config, make(config)) as run:
            threading.Thread(target=_tell_pids, args=(run,), daemon=True).start()
            yield run

    stages.open_run = open_run  # type: ignore[assignment]
    return driver.main(arguments)


def _tell_pids(run: Any) -> None:
    aside = run.directory.path / f"{PIDS}.new"
    while True:
        aside.write_text(json.dumps(run.fleet.watch.pids()))
        aside.replace(run.directory.path / PIDS)
        time.sleep(0.2)


def main(argv: Sequence[str]) -> int:
    """Run the comparison; returns the exit status."""
    if argv[:1] == ["--drive"]:
        return drive(argv[1], argv[2:])
    made = parser("chaos", __doc__)
    made.add_argument("--kills", type=int, default=12)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    made.add_argument("--engines", default="benchmarks.scripted:engines")
    made.add_argument("--keep", type=Path, help="keep both run directories here")
    arguments = made.parse_args(argv)
    targets = arguments.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        made.error(f"unknown targets {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        return _compare(arguments, targets, arguments.keep or Path(directory))


def _compare(arguments: argparse.Namespace, targets: Sequence[str], directory: Path) -> int:
    began = time.monotonic()
    quiet = Driver(directory / "undisturbed", arguments.engines)
    durations = undisturbed(quiet)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    kills = plan_kills(arguments.kills, arguments.seed, targets, durations)
    began = time.monotonic()
    driver = Driver(directory / "disturbed", arguments.engines)
    disturb(driver, kills, arguments.seed)
    left = driver.left()
    expected, found = outcome(quiet.run), outcome(driver.run)
    differing = [name for name in expected if expected[name] != found.get(name)]
    print(f"disturbed: {time.monotonic() - began:.0f} s")
    for kill in kills:
        when = "nothing to kill" if kill.at_s is None else f"at {kill.at_s:7.1f} s during {kill.during}"
        cost = "" if kill.recovered_s is None else f", {kill.recovered_s:.1f} s to recover"
        print(f"  {kill.target:12} {when}{cost}")
    print(f"verdict: {'the same' if not differing else 'DIFFERENT: ' + ', '.join(differing)}")
    record = {
        "kills": sum(kill.at_s is not None for kill in kills),
        "trees": sum(len(found[f"trees {k}"]) for k in range(1, ROUNDS + 1)),
        "trees_twice": sum(found[f"trees twice {k}"] for k in range(ROUNDS + 1)),
        "differing": len(differing),
        "processes_left": len(left),
        "undisturbed_s": sum(durations.values()),
        "log": [asdict(kill) for kill in kills],
        "differences": differing,
    }
    goals = [Goal(name, "at most", 0) for name in ("trees_twice", "differing", "processes_left")]
    return finish(record, goals, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
