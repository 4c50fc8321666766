"""What the search itself costs: CPU time a candidate with an engine that answers at once.

    python -m benchmarks.overhead [--json FILE] [--check]

Everything is counted: the CPU time that this machine spends from the first tree to the last part file, on driver,
shard, board, service hosts, sandboxes and Ray's own processes; run it where nothing else runs. The parts are those of
processes that can be asked at the end; the rest is of steps and grades, whose processes have ended then, and of
anything else. Once with real sandboxed execution, once with execution stubbed out too. Start-up is left out: a first
set of trees is grown before. A candidate is one sample of the policy, duplicates included.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import scene
from benchmarks.common import Goal, cpu_seconds, finish, local_ray, machine_seconds, parser, show_rows, spent
from evolve.policy.simulated import sum_problems

GOALS = [Goal("sandboxed_ms_per_candidate", "at most", 8.0), Goal("stubbed_ms_per_candidate", "at most", 1.0)]


def one(verifier: Callable[[], Any], trees: int, rollouts: int, directory: Path) -> dict[str, Any]:
    """Grow the trees and divide the CPU time by the candidates."""
    member = scene.member(0, scene.engine(256, math.inf), verifier)
    plan = scene.plan(rollouts)
    fleet = scene.Still([member])
    scene.grow(fleet, sum_problems(max(2, trees // 4), 1), scene.job_of(plan, directory / "warm", 64))
    before_s, machine_s = cpu_seconds(), machine_seconds()
    calls = member.stats()["requests"]
    _, seconds = scene.grow(fleet, sum_problems(trees, 2), scene.job_of(plan, directory / "measured", 64))
    machine_s = machine_seconds() - machine_s
    expansions = member.stats()["requests"] - calls
    parts = spent(before_s, cpu_seconds())
    member.close()
    candidates = expansions * plan.candidates
    per = {name: value * 1e3 / candidates for name, value in parts.items()}
    total = machine_s * 1e3 / candidates
    per["ended, and others"] = max(0.0, total - sum(per.values()))
    return {"candidates": candidates, "seconds": seconds, "ms": total, "parts": per}


def measure(trees: int, rollouts: int = 8, supervisors: int | None = None) -> dict[str, Any]:
    """Both settings; needs Ray. `supervisors`: sandboxes that execute at once; None: as many as there are cores."""
    with tempfile.TemporaryDirectory() as directory:
        found = {
            "sandboxed": one(scene.sandbox(supervisors), max(2, trees // 4), rollouts, Path(directory, "sandboxed")),
            "stubbed": one(scene.SumVerifier, trees, rollouts, Path(directory, "stubbed")),
        }
    record: dict[str, Any] = {}
    for name, result in found.items():
        record[f"{name}_ms_per_candidate"] = result["ms"]
        record[f"{name}_candidates_per_s"] = result["candidates"] / result["seconds"]
        record[f"{name}_candidates"] = result["candidates"]
        record[f"{name}_parts"] = result["parts"]
    record["execution_share"] = 1 - record["stubbed_ms_per_candidate"] / record["sandboxed_ms_per_candidate"]
    return record


def main() -> int:
    made = parser("overhead", __doc__)
    made.add_argument(
        "--trees", type=int, default=200, help="trees with execution stubbed; a quarter with real execution (200)"
    )
    arguments = made.parse_args()
    with local_ray():
        record = measure(arguments.trees)
    names = list(dict.fromkeys([*record["sandboxed_parts"], *record["stubbed_parts"]]))
    rows = [
        {
            "part": name,
            "sandboxed": record["sandboxed_parts"].get(name, 0.0),
            "stubbed": record["stubbed_parts"].get(name, 0.0),
        }
        for name in names
    ]
    show_rows(
        "CPU ms a candidate, by process",
        rows,
        {"part": "process", "sandboxed": "real execution", "stubbed": "execution stubbed"},
    )
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
