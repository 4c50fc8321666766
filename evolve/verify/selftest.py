"""Runs hostile snippets through a verifier and says whether it held.

A snippets file is a JSON list of objects: `name`, `code`, optional `prefix_steps` (run first, each as its
own step) and `then_sibling` (run from the same parent afterwards), `timeout_s`, and `expect` with
`status_in`, `stdout_contains`, `stdout_not_contains`, `sibling_stdout_equals`, `invariants`, `note`. The status
`protocol` is an older name of `refused`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve.schema import VerifierConfig
from evolve.types import Problem, Status, Verdict
from evolve.verify.layers import Layers
from evolve.verify.nodes import process_parents
from evolve.verify.service import SandboxVerifier
from evolve.verify.steps import prefix_keys, refusal, server_kind

SECRET = "SECRET-4f1d7c"
"""Put into this process's environment: nothing inside may see it."""
GOLD = "GOLD-31337"
"""A gold answer held by the verifier: nothing inside may see it."""
MESSAGE_MOST = 2100

INVARIANTS = frozenset(
    [
        "zygote_alive",
        "canary_alive",
        "output_capped",
        "no_cross_node_effect",
        "snapshot_idle_uses_no_cpu",
        "no_leftover_process",
    ]
)

STATUSES = frozenset([*(str(status) for status in Status), "protocol"])

TEXT, TEXTS, OBJECT = "a string", "a list of strings", "an object"
SECONDS, OPTIONAL = "a number above 0", "a string or null"
SNIPPET = {
    "name": TEXT,
    "code": TEXT,
    "expect": OBJECT,
    "timeout_s": SECONDS,
    "prefix_steps": TEXTS,
    "then_sibling": OPTIONAL,
}
"""What each member of a snippet must be."""
EXPECT = {
    "status_in": TEXTS,
    "stdout_contains": TEXTS,
    "stdout_not_contains": TEXTS,
    "sibling_stdout_equals": TEXT,
    "invariants": TEXTS,
    "note": TEXT,
}
"""What each member of its `expect` must be."""
FITS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str),
    TEXTS: lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    OBJECT: lambda value: isinstance(value, dict),
    SECONDS: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6,
    OPTIONAL: lambda value: value is None or isinstance(value, str),
}


@dataclass(frozen=True)
class Snippet:
    """One hostile or delicate piece of code and what must come back."""

    name: str
    code: str
    expect: dict[str, Any]
    timeout_s: float = 2.0
    prefix_steps: tuple[str, ...] = ()
    then_sibling: str | None = None


@dataclass
class Report:
    """What became of one snippet."""

    name: str
    status: str
    seconds: float
    failures: list[str] = field(default_factory=list)


def load(path: Path) -> list[Snippet]:
    """Read a snippets file.

    Raises:
        ValueError: it is no JSON list of objects, or a member of one is unknown, missing or not what it must be.
    """
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is not a JSON list of objects")
    for entry in entries:
        finding = _finding(entry)
        if finding:
            raise ValueError(f"{path}: {entry.get('name')!r}: {finding}")
    return [Snippet(**{**entry, "prefix_steps": tuple(entry.get("prefix_steps", ()))}) for entry in entries]


def _finding(entry: dict[str, Any]) -> str:
    """What is wrong with an entry of a snippets file, and what it must be; the empty string: nothing."""
    expect = entry.get("expect")
    for keys, needed, allowed, where in (
        (entry, {"name", "code", "expect"}, SNIPPET, ""),
        (expect if isinstance(expect, dict) else {}, {"status_in"}, EXPECT, "expect."),
    ):
        for name, value in keys.items():
            if name not in allowed:
                return f"unknown key {where}{name}; it must be one of {', '.join(allowed)}"
            if not FITS[allowed[name]](value):
                return f"{where}{name} is {value!r:.100}; it must be {allowed[name]}"
        missing = needed - set(keys)
        if missing:
            return f"the key {where}{min(missing)} is missing"
    assert isinstance(expect, dict)
    for key, known in (("status_in", STATUSES), ("invariants", INVARIANTS)):
        odd = set(expect.get(key, ())) - known
        if odd:
            return f"unknown expect.{key} {sorted(odd)}; they must be of {', '.join(sorted(known))}"
    return ""


def descendants() -> dict[int, str]:
    """Processes below this one, with their state letter."""
    parents = {pid: (parent, state) for pid, parent, state in process_parents()}
    mine = os.getpid()
    found = {}
    for pid, (_, state) in parents.items():
        ancestor = pid
        while ancestor in parents and ancestor != mine:
            ancestor = parents[ancestor][0]
        if ancestor == mine and pid != mine:
            found[pid] = state
    return found


def stopped() -> int:
    """How many processes below this one are stopped."""
    return sum(state == "T" for state in descendants().values())


class SelfTest:
    """One verifier put through snippets."""

    def __init__(self, config: VerifierConfig, layers: Layers | None = None) -> None:
        os.environ["SECRET"] = SECRET
        self.verifier = SandboxVerifier(config, layers)
        self.config = config
        self.canary = Problem("canary", "", (GOLD,))
        self.others = stopped()
        """Stopped processes that are another verifier's of this process."""

    async def run(self, problem: Problem, parent: Iterable[str], step: str, limit: float, spare: float) -> Verdict:
        """Execute a step under its own limits; `spare`: how much more wall than CPU time."""
        codes = (*parent, step)
        kind = server_kind(codes)
        keys = prefix_keys(problem.id, codes)
        return refusal(codes) or await self.verifier.execute(problem.id, codes, kind, keys, limit, limit * spare)

    async def prepare(self, warm: int = 63) -> None:
        """Start everything, and leave a canary: a live state that must survive all that follows.

        `warm`: further problems, so many that every supervisor gets some and so has all its interpreter servers up.
        """
        self.quadratic = "from sympy import symbols, solve\nx = symbols('x')"
        problems = [self.canary, *(Problem(f"warm{i}", "", (GOLD,)) for i in range(warm))]
        for verdicts in (
            await self.verifier.check_many([(problem, (), self.quadratic) for problem in problems]),
            await self.verifier.check_many([(problem, (), "light = 1") for problem in problems]),
            await self.verifier.check_many([(problem, (), "import numpy") for problem in problems]),
        ):
            for verdict in verdicts:
                if verdict.status is not Status.OK:
                    raise RuntimeError(f"the sandbox does not run ordinary code here: {verdict}")
        await self.verifier.grade_many([(problem, "\\frac{1}{2}") for problem in problems])

    async def zygotes_work(self) -> bool:
        """Whether a fresh interpreter and the canary's state still solve a quadratic."""
        fresh = Problem(f"fresh{time.monotonic_ns()}", "", (GOLD,))
        code = self.quadratic + "\nprint(solve(x**2 - 5*x + 6, x))"
        results = await asyncio.gather(
            self.run(fresh, (), code, 20, 3),
            self.run(self.canary, (self.quadratic,), "print(solve(x**2 - 5*x + 6, x))", 20, 3),
            self.run(fresh, ("a = 3",), "print(a + 4)", 5, 6),
        )
        return [result.stdout for result in results] == ["[2, 3]\n", "[2, 3]\n", "7\n"]

    async def one(self, snippet: Snippet, alone: bool) -> Report:
        """Run one snippet and check all that can be checked while others run beside it (or not: `alone`)."""
        began = time.monotonic()
        spare = 2.0 if alone else 10.0
        problem = Problem(f"{snippet.name}-{time.monotonic_ns()}", "", (GOLD,))
        report = Report(snippet.name, "", 0.0)
        before = await self.awake() if alone else 0
        for index, step in enumerate(snippet.prefix_steps):
            verdict = await self.run(problem, snippet.prefix_steps[:index], step, 10, 3)
            if not verdict.ok:
                report.failures.append(f"prefix step {index + 1}: {verdict.status} {verdict.message}")
        verdict = await self.run(problem, snippet.prefix_steps, snippet.code, snippet.timeout_s, spare)
        report.status = verdict.status.value
        self.judge(snippet, verdict, report)
        if snippet.then_sibling is not None:
            sibling = await self.run(problem, snippet.prefix_steps, snippet.then_sibling, 10, 3)
            wanted = snippet.expect.get("sibling_stdout_equals")
            if sibling.stdout != wanted:
                report.failures.append(f"sibling printed {sibling.stdout!r} ({sibling.status}), not {wanted!r}")
        if not await self.zygotes_work():
            report.failures.append("an interpreter server no longer works")
        if alone:
            await self.look_for_leftovers(before, report)
        report.seconds = time.monotonic() - began
        return report

    def judge(self, snippet: Snippet, verdict: Verdict, report: Report) -> None:
        """Compare a verdict with what was expected."""
        expect = snippet.expect
        allowed = {"refused" if status == "protocol" else status for status in expect["status_in"]}
        if verdict.status not in allowed:
            report.failures.append(f"status {verdict.status} ({verdict.message[:200]}), not one of {sorted(allowed)}")
        for text in expect.get("stdout_contains", ()):
            if text not in verdict.stdout:
                report.failures.append(f"stdout lacks {text!r}: {verdict.stdout[:200]!r}")
        said = verdict.stdout + verdict.message + verdict.exception
        for text in (*expect.get("stdout_not_contains", ()), SECRET, GOLD):
            if text in (verdict.stdout if text not in (SECRET, GOLD) else said):
                report.failures.append(f"stdout has {text!r}")
        size = len(verdict.stdout.encode("utf-8", "surrogatepass"))
        if size > self.config.output_bytes or len(verdict.message) > MESSAGE_MOST:
            report.failures.append(f"output of {size} bytes, message of {len(verdict.message)} characters")

    async def awake(self) -> int:
        """Processes below this one that are not stopped, without the lane's workers, which come and go."""
        workers = int((await self.verifier.stats())["lane_workers"])
        return sum(state != "T" for state in descendants().values()) - workers

    async def look_for_leftovers(self, before: int, report: Report) -> None:
        """Beyond the `before` processes that were awake there must be stopped snapshots only, all known."""
        for _ in range(50):
            awake = await self.awake()
            snapshots = int((await self.verifier.stats())["snapshots"])
            idle = stopped() - self.others
            if idle == snapshots and awake <= before:
                return
            await asyncio.sleep(0.02)
        report.failures.append(f"left over: {awake - before} awake, {idle} stopped for {snapshots} snapshots")

    async def all(self, snippets: list[Snippet], concurrency: int) -> list[Report]:
        """Run all snippets, `concurrency` at a time; above 1 beside ordinary work."""
        if concurrency == 1:
            return [_say(await self.one(snippet, alone=True)) for snippet in snippets]
        gate = asyncio.Semaphore(concurrency)
        done = asyncio.Event()
        worked: list[str] = []

        async def ordinary(number: int) -> None:
            while not done.is_set():
                if not await self.zygotes_work():
                    worked.append(f"ordinary work beside the snippets went wrong (worker {number})")

        async def gated(snippet: Snippet) -> Report:
            async with gate:
                return _say(await self.one(snippet, alone=False))

        before = await self.awake()
        workers = [asyncio.ensure_future(ordinary(number)) for number in range(2)]
        reports = list(await asyncio.gather(*map(gated, snippets)))
        done.set()
        await asyncio.gather(*workers)
        after = Report("ordinary work", "ok", 0.0, worked[:3])
        await self.look_for_leftovers(before, after)
        return [*reports, _say(after)]


def _say(report: Report) -> Report:
    mark = "FAIL" if report.failures else "ok  "
    print(
        f"{mark} {report.name:32} {report.status:14} {report.seconds:6.2f} s  {'; '.join(report.failures)}", flush=True
    )
    return report


async def self_test(snippets: list[Snippet], concurrency: int, layers: Layers | None = None) -> int:
    """Run and print; the number of snippets that failed."""
    test = SelfTest(VerifierConfig(), layers)
    try:
        await test.prepare()
        found = await test.verifier.describe()
        print(f"layers: {found['tier']}; supervisors: {found['supervisors']}")
        for lack in found["missing"]:
            print(f"missing: {lack}", file=sys.stderr)
        reports = await test.all(snippets, concurrency)
    finally:
        await test.verifier.close()
    failed = sum(bool(report.failures) for report in reports)
    print(f"{len(reports) - failed} of {len(reports)} passed, {concurrency} at a time")
    return failed
