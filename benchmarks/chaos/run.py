"""A run under test as the outside sees it: its command, its stages by their manifests, its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil

from benchmarks.chaos.drive import PIDS
from benchmarks.chaos.plan import STAGES, Stage
from benchmarks.chaos.recipe import ONE_A_NODE
from evolve.store.run import RunDirectory

TITLES = {"shard": "ray::Shard", "board": "ray::Board", "evaluator": "ray::Evaluator", "mailbox": "ray::Mailbox",
          "trainer": "RayTrainWorker", "supervisor": "evolve.verify.supervisor"}  # fmt: skip
"""What the titles of processes contain."""
OURS = (*TITLES.values(), "ray::ServiceHost", "ray::TrainController", "evolve.verify", "bwrap")
"""What the titles of all processes of a run contain, that a cluster's own processes do not."""
ROLES = {"engine": "policy engine", "ppm": "PPM engine", "verifier": "verifier"}
"""How the driver calls the services."""
WORKING = {"search": "ray::Shard", "sft": "RayTrainWorker", "evaluation": "ray::Evaluator"}
"""What works on a node during a stage."""
TWICE = "Ctrl-C twice"
LEFT_S = 20.0
"""How long processes may take to end after their driver has."""
START_S = 180.0


class Machines:
    """Pretended machines in a process of their own (`benchmarks.chaos.machines`)."""

    def __init__(self, count: int, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "address"
        with (directory / "machines.txt").open("w") as log:
            command = [sys.executable, "-m", "benchmarks.chaos", "--machines", str(count), str(file)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not file.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.end()
                raise SystemExit(f"no cluster: {(directory / 'machines.txt').read_text()[-2000:]}")
            time.sleep(0.2)
        self.address = file.read_text()

    def raylets(self) -> list[psutil.Process]:
        """The nodes that can be lost; the head, which has the cluster's memory, is none of them."""
        found = [p for p in psutil.Process(self.process.pid).children() if "raylet/raylet" in title(p)]
        return [raylet for raylet in found if "--head" not in title(raylet)]

    def end(self) -> None:
        """End the cluster."""
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        self.process.wait(60)
        for left in psutil.wait_procs(below, timeout=10)[1]:
            left.kill()


class Run:
    """The command in a process of its own, started again as often as it is ended, alone or in a cluster."""

    def __init__(self, directory: Path, engines: str, recipe: Sequence[str], machines: Machines | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.machines = machines
        self.path = directory / "smoke"
        self._log = directory / "log.txt"
        where = () if machines is None else (f"cluster.address={machines.address}", *ONE_A_NODE)
        drive = (sys.executable, "-m", "benchmarks.chaos", "--drive", engines)
        self._command = [*drive, *recipe, f"run.dir={directory}", *where]
        self.seen: dict[int, float] = {}
        """Every process that was seen below a driver, with its start time."""
        self.start()

    def start(self) -> None:
        """Type the command."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RAY_"))}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def log(self) -> str:
        """Everything said so far."""
        return self._log.read_text(errors="replace")

    def stage(self) -> Stage | None:
        """The first stage that no manifest names; None when all are done."""
        directory = RunDirectory(self.path)
        return next((s for s in STAGES if directory.round(s[1]).finished(s[0]) is None), None)

    def steps(self, stage: Stage) -> list[int]:
        """The numbers of a training stage's steps as they were logged; after a resume some occur again."""
        file = RunDirectory(self.path).round(stage[1]).path / stage[0] / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [int(found[1]) for line in lines if (found := re.search(r'"step": (\d+)', line))]

    def tree(self) -> list[psutil.Process]:
        """The processes of this run now: those below the driver, or in the cluster."""
        root = self.process.pid if self.machines is None else self.machines.process.pid
        try:
            found = psutil.Process(root).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        if self.machines is not None:
            found = [process for process in found if any(ours in title(process) for ours in OURS)]
        for process in found:
            self.seen.setdefault(process.pid, started(process))
        return found

    def candidates(self, target: str, stage: Stage) -> list[int]:
        """Ids of the processes that a target may stand for, none when there is none at work."""
        if target in ("driver", "interrupt"):
            return [self.process.pid] if self.process.poll() is None else []
        if target == "node":
            nodes = self.machines.raylets() if self.machines is not None else []
            return [n.pid for n in nodes if any(WORKING[stage[0]] in title(p) for p in n.children(recursive=True))]
        if target in ROLES:
            try:
                pids = json.loads((self.path / PIDS).read_text())
            except (FileNotFoundError, ValueError):
                return []
            return [pid for name, pid in pids.items() if name.startswith(ROLES[target]) and psutil.pid_exists(pid)]
        return [process.pid for process in self.tree() if _is(process, target)]

    def left(self) -> list[int]:
        """Processes of this run that outlived it, after giving them time to end."""
        deadline = time.monotonic() + LEFT_S
        while True:
            alive = [pid for pid, since in self.seen.items() if _alive(pid, since, self.machines is not None)]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.5)

    def end(self) -> None:
        """End the driver, if it still runs, in good order."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)


def kill(pid: int, target: str, rng: Random) -> str:
    """End a target, and what is on it where it is a node; says how."""
    if target == "node":
        victims = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        return f"{len(victims)} processes"
    if target == "interrupt":
        how = rng.choice(("Ctrl-C", "SIGTERM", TWICE))
        if how == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGINT)  # a terminal sends it to the whole group
        if how == TWICE:
            time.sleep(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGINT)
        return how
    os.kill(pid, signal.SIGKILL)
    return ""


def title(process: psutil.Process) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def started(process: psutil.Process) -> float:
    """When a process began; 0 when it has ended."""
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0


def _is(process: psutil.Process, target: str) -> bool:
    if target != "interpreter":
        return TITLES[target] in title(process)
    try:
        return any(TITLES["supervisor"] in title(parent) for parent in process.parents())
    except psutil.Error:
        return False


def _alive(pid: int, since: float, cluster: bool) -> bool:
    """Whether a process is still there. A cluster's worker that has become idle again is the cluster's."""
    try:
        process = psutil.Process(pid)
        there = process.create_time() == since and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return there and (not cluster or any(ours in title(process) for ours in OURS))
