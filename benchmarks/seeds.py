"""What several runs of one recipe say together: do the goals of the quickstart hold over their seeds?

    python -m benchmarks.seeds runs/s0 runs/s1 runs/s2 [--json FILE] [--check]

Every round of every run as a row, then the PPM's methods against the majority vote with the problems of all runs
pooled: paired differences with 95 % bootstrap intervals. `--check` exits with 1 unless, in every run, greedy decoding
rises in rounds 1 and 2 and ends at twice the base model's or more, the coverage of fresh problems rises every round,
and a method with the PPM is ahead of the vote outside the pooled interval in rounds 1 and 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import parser
from evolve.evaluate import Record, best, interval, majority, record_from

Method = Callable[[Record], float | None]
RESAMPLES = 5000

METHODS: dict[str, Method] = {
    "PPM best-of-N": lambda r: float(best(r, lambda s: s.score)),
    "PPM beam": lambda r: None if r.beam is None else float(r.beam.correct),
    "PPM-guided MCTS": lambda r: None if r.search is None else float(r.search.correct),
}
"""1, 0, or None on a problem that the method was not run on."""
CONTROLS: dict[str, Callable[[Record], float]] = {
    "majority": lambda r: float(majority(r)),
    "log-probability": lambda r: float(best(r, lambda s: s.logprob)),
}


def accuracies(entry: Mapping[str, Any]) -> dict[str, float]:
    """A round's accuracy by method, best-of-N and votes without their N."""
    rows = entry.get("evaluation", {}).get("rows", [])
    return {row["method"].partition("@")[0]: row["accuracy"]["value"] for row in rows}


def coverage(entry: Mapping[str, Any]) -> float | None:
    search = entry.get("search")
    return search["solved"] / search["problems"] if search else None


def pooled(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each method minus each control, over the problems that the method was run on."""
    found = []
    for name, method in METHODS.items():
        measured = [(value, record) for record in records if (value := method(record)) is not None]
        for label, control in CONTROLS.items():
            if measured:
                difference = interval([value - control(record) for value, record in measured], RESAMPLES)
                found.append(
                    {
                        "method": name,
                        "minus": label,
                        "problems": len(measured),
                        "value": difference.value,
                        "low": difference.low,
                        "high": difference.high,
                    }
                )
    return found


def missed(reports: Sequence[Mapping[str, Any]], differences: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The goals that do not hold, in words."""
    complaints = []
    for report in reports:
        rounds = report["rounds"]
        greedy = [accuracies(entry)["greedy"] for entry in rounds]
        covered = [share for entry in rounds if (share := coverage(entry)) is not None]
        if not greedy[0] < greedy[1] < greedy[2]:
            complaints.append(f"{report['run']}: greedy does not rise in rounds 1 and 2")
        if greedy[-1] < 2 * greedy[0]:
            complaints.append(f"{report['run']}: greedy ends below twice the base model's")
        if not all(a < b for a, b in pairwise(covered)):
            complaints.append(f"{report['run']}: coverage does not rise every round")
    for number in (1, 2):
        if not any(d["minus"] == "majority" and d["low"] > 0 for d in differences.get(number, ())):
            complaints.append(f"round {number}: no method with the PPM is ahead of the vote outside the interval")
    return complaints


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("seeds", __doc__)
    made.add_argument("runs", type=Path, nargs="+", help="finished run directories of one recipe")
    options = made.parse_args(arguments)
    if lacking := [run for run in options.runs if not (run / "report.json").is_file()]:
        made.error(f"{lacking[0]}: no report.json, so no run directory with a finished round")
    reports = [json.loads((run / "report.json").read_text()) for run in options.runs]
    numbers = sorted({entry["round"] for report in reports for entry in report["rounds"]} - {0})
    differences = {
        number: pooled(
            [
                record_from(row)
                for run in options.runs
                for row in json.loads((run / f"round-{number}" / "eval" / "records.json").read_text())
            ]
        )
        for number in numbers
    }
    complaints = missed(reports, differences)
    show(reports, differences, complaints)
    if options.json:
        figures = {"runs": reports, "differences": differences, "missed": complaints}
        options.json.write_text(json.dumps(figures, indent=1))
    return 1 if options.check and complaints else 0


def show(
    reports: Sequence[Mapping[str, Any]],
    differences: Mapping[int, Sequence[Mapping[str, Any]]],
    complaints: Sequence[str],
) -> None:
    """Print both tables, and what is missed."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = ("greedy", "majority", "log-probability best-of-8", "PPM best-of-8", "PPM beam", "PPM-guided MCTS")
    table = Table(title="Every round of every run", title_justify="left")
    for column in ("run", "round", "coverage", *columns):
        table.add_column(column, justify="right")
    for report in reports:
        for entry in report["rounds"]:
            found, share = accuracies(entry), coverage(entry)
            cells = [f"{found[c]:.1%}" if c in found else "" for c in columns]
            table.add_row(report["run"], str(entry["round"]), "" if share is None else f"{share:.1%}", *cells)
        table.add_section()
    console.print(table)
    table = Table(title=f"{len(reports)} runs pooled, paired differences with 95 % intervals", title_justify="left")
    for column in ("round", "method", "minus", "problems", "difference"):
        table.add_column(column, justify="right")
    for number, found_ in differences.items():
        for d in found_:
            table.add_row(
                str(number),
                d["method"],
                d["minus"],
                str(d["problems"]),
                f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]",
            )
        table.add_section()
    console.print(table)
    for complaint in complaints:
        console.print(f"missed: {complaint}")


if __name__ == "__main__":
    sys.exit(main())
