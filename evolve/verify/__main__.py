"""`python -m evolve.verify FILE.py`: run a file's steps and print the verdicts.

`python -m evolve.verify --self-test [--snippets FILE] [--concurrency N]`: say which isolation layers are
active, run hostile snippets, exit 1 when one gets through.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path

from evolve.schema import VerifierConfig
from evolve.types import Problem
from evolve.verify.layers import SandboxUnavailable
from evolve.verify.selftest import load, self_test
from evolve.verify.service import SandboxVerifier

BOUNDARY = "<end_of_step>"
"""Ends a step in a solution's text."""
END = "<end_of_code>"
"""Ends the last one."""

_MARKERS = re.compile(rf"^[ \t]*({BOUNDARY}|{END})|({BOUNDARY}|{END})[ \t]*$", re.MULTILINE)
"""They count where step formats put them: on lines of their own, before the next step, or after a step's last line."""

OWN_SNIPPETS = Path(__file__).parents[2] / "tests" / "verify" / "hostile.json"


def split_steps(text: str) -> list[str]:
    """A file's steps: split at the step boundary; the tags around the code are dropped. Nothing is one empty step.

    Raises:
        ValueError: behind the end of the code is something that is neither output nor answer.
    """
    steps, start = [], 0
    for marker in _MARKERS.finditer(text):
        steps.append(text[start : marker.start()])
        start = marker.end()
        if END in marker[0]:
            break
    rest = text[start:]
    if not steps or END not in marker[0]:
        steps.append(rest)
    elif rest.strip() and not rest.lstrip().startswith(("<output>", "<answer>")):
        line = text.count("\n", 0, start + len(rest) - len(rest.lstrip())) + 1
        raise ValueError(
            f"line {line}: only <output> and <answer> may follow {END}, which ends the code; remove it, or what follows"
        )
    codes = [re.sub(r"\A\s*<code>", "", step).strip("\n") for step in steps]
    return [code for code in codes if code.strip()] or [""]


def printable(text: str) -> str:
    """`text` in ASCII: line ends stay, all else that would steer a terminal or that it may not show is escaped."""
    plain = (c == "\n" or (c.isascii() and c.isprintable()) for c in text)
    return "".join(c if keep else c.encode("unicode_escape").decode() for c, keep in zip(text, plain, strict=True))


async def run_steps(name: str, steps: list[str]) -> int:
    """Run steps one after another; 1 when one fails."""
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    problem = Problem(name, "", ())
    try:
        for number, step in enumerate(steps):
            verdict = await verifier.check(problem, tuple(steps[:number]), step)
            where = f" line {verdict.line}" if verdict.line else ""
            said = printable(" ".join(filter(None, (verdict.exception, verdict.message)))).replace("\n", "\\n")
            cause = "" if verdict.ok else f": {said}{where}"
            notes = f"{verdict.cpu_s * 1e3:.1f} ms CPU, {verdict.wall_s * 1e3:.1f} ms"
            notes += ", replayed" * verdict.replayed + ", not deterministic" * (not verdict.deterministic)
            print(f"step {number + 1}: {verdict.status}{cause} ({notes})")
            if verdict.stdout:
                print(printable(verdict.stdout).rstrip("\n") + (" ..." if verdict.truncated else ""))
            if not verdict.ok:
                return 1
    finally:
        await verifier.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evolve.verify", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help=f"Python code; steps end with {BOUNDARY} at a line's end")
    parser.add_argument("--self-test", action="store_true", help="run the hostile snippets")
    parser.add_argument("--snippets", type=Path, help=f"snippets to run (default: {OWN_SNIPPETS.name})")
    parser.add_argument("--concurrency", type=int, default=1, help="snippets at a time")
    arguments = parser.parse_args()
    if arguments.self_test == (arguments.file is not None):
        parser.error("give either a file or --self-test")
    if arguments.snippets is not None and not arguments.self_test:
        parser.error("--snippets is for --self-test, not for a file")
    path = (arguments.snippets or OWN_SNIPPETS) if arguments.self_test else arguments.file
    if not path.is_file():
        parser.error(f"{path} is not a file")
    if arguments.concurrency < 1:
        parser.error("--concurrency must be at least 1")
    try:
        if arguments.self_test:
            return 1 if asyncio.run(self_test(load(path), arguments.concurrency)) else 0
        steps = split_steps(path.read_text("utf-8-sig", "surrogateescape"))
        return asyncio.run(run_steps(path.name, steps))
    except (SandboxUnavailable, ValueError) as error:
        print(f"evolve.verify: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
