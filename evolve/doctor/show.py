"""Checks as a table for people and as JSON for scripts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evolve.doctor.checks import Check, Status, failed
from evolve.files import publish_json
from evolve.placement import listed

COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
WIDTH = 120
"""Of output that is not a terminal's."""
NAMES = 4


def grouped(checks: Sequence[Check]) -> list[tuple[Check, list[str]]]:
    """Checks that say the same of several nodes as one, with the nodes, in the order of their first.

    Checks that passed are one for all nodes, even where sizes differ from node to node.
    """
    found: dict[tuple[str, ...], list[Check]] = {}
    for check in checks:
        said = () if check.status is Status.OK else (check.what, check.fix)
        found.setdefault((check.name, check.status, *said), []).append(check)
    return [(replace(group[0], what=_said(group)), [check.where for check in group]) for group in found.values()]


def _said(group: Sequence[Check]) -> str:
    different = list(dict.fromkeys(check.what for check in group))
    more = f" ... and {len(different) - 2} more" if len(different) > 2 else ""
    return "; ".join(different[:2]) + more


def table(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print the checks, each that is not ok with its fix below, and the verdict."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "check", "where", "found"):
        shown.add_column(column, overflow="fold")
    for check, where in grouped(checks):
        what = Text(check.what)
        if check.fix:
            what.append(f"\nfix: {check.fix}", style="italic")
        shown.add_row(Text(check.status, style=COLOURS[check.status]), check.name, Text(listed(where, NAMES)), what)
    console.print(shown)
    bad, odd = (sum(check.status is status for check in checks) for status in (Status.FAIL, Status.WARN))
    verdict = f"{bad} of {len(checks)} checks failed" if failed(checks) else f"all {len(checks)} checks passed"
    console.print(verdict + (f", {odd} with a warning" if odd else ""))


def write(checks: Sequence[Check], path: Path) -> None:
    """`{"ok": bool, "checks": [{name, where, status, what, fix}]}`."""
    publish_json(path, {"ok": not failed(checks), "checks": [asdict(check) for check in checks]})
