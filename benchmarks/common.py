"""What all benchmarks share: arguments, goals, the printed record, and the CPU time of a whole process tree.

A benchmark measures everything it compares in one run and prints ratios; `--check` exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that a number of the record must keep."""

    name: str
    word: str
    """`at most` or `at least`."""
    bound: float

    def met(self, record: Mapping[str, Any]) -> bool:
        """Whether the record keeps the bound."""
        value = record[self.name]
        return bool(value <= self.bound if self.word == "at most" else value >= self.bound)


def parser(name: str, doc: str | None, check: bool = True) -> argparse.ArgumentParser:
    """The arguments every benchmark has: `--json FILE` and, where it has goals, `--check`."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="write the record here")
    if check:
        made.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    return made


def finish(record: Mapping[str, Any], goals: Sequence[Goal], arguments: argparse.Namespace) -> int:
    """Print the record's numbers with their goals, write it where asked, and return the exit status."""
    by_name = {goal.name: goal for goal in goals}
    missed = [goal.name for goal in goals if not goal.met(record)]
    for name, value in record.items():
        if isinstance(value, list | dict):
            continue
        line = f"{name:44} {value if isinstance(value, str) else f'{value:12.3f}'}"
        if (goal := by_name.get(name)) is not None:
            line += f"   goal: {goal.word} {goal.bound:g}{'   MISSED' if name in missed else ''}"
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if missed and arguments.check else 0


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows as a table; `columns` maps a row's keys to headings."""
    table = Table(title=title, title_justify="left")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{v:,.3f}" if isinstance(v := row[key], float) else str(v) for key in columns))
    Console(width=120).print(table)


@contextlib.contextmanager
def local_ray(cpus: int = 2) -> Iterator[None]:
    """A Ray of this process' own, ended with the block; never one that runs here already."""
    ray.init(address="local", num_cpus=cpus, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def beside(commands: Iterable[Sequence[str]]) -> Iterator[None]:
    """Processes that run until the block ends, and are killed then."""
    with contextlib.ExitStack() as ending:
        for command in commands:
            process = ending.enter_context(subprocess.Popen(command))
            ending.callback(process.kill)
        yield


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of this process and all that descend from it, by name.

    Of processes that have ended only those are counted that somebody waited for.

    Ray's own processes are among them where this process started Ray. An actor is named as its class.
    """
    me = psutil.Process()
    found: dict[str, float] = {}
    for process in [me, *me.children(recursive=True)]:
        try:
            times, words = process.cpu_times(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = "driver" if process == me else _role(words)
        found[name] = found.get(name, 0.0) + sum(times[:4])
    return found


def machine_seconds() -> float:
    """CPU seconds that this machine has spent so far on anything, processes that ended included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds by name between two `cpu_seconds`, the most first."""
    change = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return dict(sorted(((n, v) for n, v in change.items() if v > 0), key=lambda item: -item[1]))


def _role(words: Sequence[str]) -> str:
    """What a process is called in a table: an actor's class, a module, a program."""
    if not words:
        return "ended"
    first = words[0]
    if first.startswith("ray::"):
        return first.removeprefix("ray::").split(".")[0].split(":")[0].split("(")[0]
    if Path(first).name.startswith("python"):
        if "-P" in words:  # as the verifier starts all of its own
            return "sandbox"
        programs = [word for word in words[1:] if word.endswith(".py")]
        return Path(programs[0]).stem if programs else "python"
    return Path(first).name
