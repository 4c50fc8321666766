"""Whether memory stays bounded: many small trees through one shard, and what driver and shard hold meanwhile.

    python -m benchmarks.memory [--trees 20000] [--json FILE] [--check]

The engine is simulated and answers at once, execution is stubbed out; shard, board, service hosts, object store and
part files are the real ones. Resident memory is read while the trees come in; growth is the most that a process held
after the first tenth of the trees, over what it held then. Board and service host are shown as well.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks import scene
from benchmarks.common import Goal, finish, local_ray, parser, show_rows
from evolve.policy.simulated import sum_problems
from evolve.search.board import Progress

GOALS = [Goal("driver_growth", "at most", 1.1), Goal("shard_growth", "at most", 1.1)]
WATCHED = ("driver", "shard", "board", "host")


def resident_mb() -> dict[str, float]:
    """Resident memory now, MB, of this process and of the actors it started, by role."""
    me = psutil.Process()
    found = {"driver": me.memory_info().rss / 1e6}
    roles = {"ray::Shard": "shard", "ray::Board": "board", "ray::ServiceHost": "host"}
    for process in me.children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0].partition(".")[0]
            if name in roles:
                found[roles[name]] = max(found.get(roles[name], 0.0), process.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            continue
    return found


def measure(trees: int, at_once: int = 64) -> dict[str, Any]:
    """Grow the trees, watching; needs Ray."""
    rows: list[dict[str, Any]] = []

    def watch(progress: Progress) -> None:
        if not rows or progress.trees >= rows[-1]["trees"] + trees / 100:
            rows.append({"trees": progress.trees, **resident_mb()})

    with tempfile.TemporaryDirectory() as directory:
        member = scene.member(0, scene.engine(256, math.inf), scene.SumVerifier)
        job = scene.job_of(scene.plan(rollouts=2, candidates=2), Path(directory), at_once)
        problems = sum_problems(trees, 6, shortest=2, longest=4)
        progress, seconds = scene.grow(scene.Still([member]), problems, job, watch)
        parts = len(list(Path(directory).glob("*.parquet")))
        member.close()
    late = [row for row in rows if row["trees"] >= trees / 10 and all(role in row for role in WATCHED)]
    if len(late) < 3:
        raise RuntimeError(f"only {len(late)} readings after the first tenth: use more trees")
    record: dict[str, Any] = {"trees": progress.trees, "seconds": seconds, "part_files": parts}
    for role in WATCHED:
        record[f"{role}_mb_after_a_tenth"] = late[0][role]
        record[f"{role}_growth"] = max(row[role] for row in late) / late[0][role]
    record["rows"] = rows
    return record


def main() -> int:
    made = parser("memory", __doc__)
    made.add_argument("--trees", type=int, default=20_000, help="trees (20000)")
    arguments = made.parse_args()
    with local_ray():
        record = measure(arguments.trees)
    columns = {"trees": "trees", **{role: f"{role} MB" for role in WATCHED}}
    shown = [row for row in record["rows"][:: max(1, len(record["rows"]) // 20)] if len(row) == len(columns)]
    show_rows("resident memory", shown, columns)
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
