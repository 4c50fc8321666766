"""What the verifier costs: `python -m benchmarks.verifier [--json FILE] [--check]`.

Everything runs on one core, so that executions a second are per core with all helpers included. Each goal
is a ratio measured in this run: against the host's own floor (the same warmed interpreter, no sandbox, which
forks, runs the same step and exits), or against re-running the prefix.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Goal, finish, parser
from evolve.schema import VerifierConfig
from evolve.types import Verdict
from evolve.verify.layers import ENVIRONMENT
from evolve.verify.selftest import descendants
from evolve.verify.service import SandboxVerifier
from evolve.verify.steps import prefix_keys, server_kind

STEPS = {
    "trivial": ("a = 3", "b = a + {i}\nprint(b)"),
    "numpy": ("import numpy as np\na = np.arange(10)", "print((a * {i}).sum())"),
    "sympy": ("from sympy import symbols, solve\nx = symbols('x')", "print(solve(x**2 - {i}*x + {i} - 1, x))"),
}
"""A first step and the siblings that follow it."""

CHAIN = [
    "from sympy import *\nx, y = symbols('x y')",
    "f = expand((x + 1)**3 * (x - 2))",
    "g = diff(f, x)\nprint(g)",
    "roots = solve(g, x)\nprint(roots)",
    "values = [f.subs(x, r) for r in roots]\nprint(values)",
    "area = integrate(f, (x, 0, 2))\nprint(area)",
    "s = solve([x + y - 5, x - y - 1], [x, y])\nprint(s)",
    "answer = simplify(area + s[x] * s[y])\nprint(answer)",
]
FLOOR = """
import sys, os, time
sys.path.insert(0, {here!r})
import preload
preload.preload({kind!r})
import gc
gc.collect(); gc.freeze()
names = {{}}
exec({root!r}, names)
sys.stdout = open(os.devnull, "w")
def once(code):
    pid = os.fork()
    if pid == 0:
        if code:
            exec(compile(code, "<step>", "exec"), names)
        os._exit(0)
    os.waitpid(pid, 0)
out = []
for template in ("", {step!r}):
    for i in range(20):
        once(template.replace("{{i}}", str(1000 + i)))
    begin = time.perf_counter()
    for i in range({count}):
        once(template.replace("{{i}}", str(i)))
    out.append((time.perf_counter() - begin) / {count})
os.write(2, repr(out).encode())
"""


def floor(kind: str, root: str, step: str, count: int) -> tuple[float, float]:
    """Seconds for fork + exit, and for fork + the step + exit, of the interpreter a server of `kind` has."""
    here = str(Path(__file__).parents[1] / "evolve" / "verify")
    script = FLOOR.format(here=here, kind=kind, root=root, step=step, count=count)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    empty, full = json.loads(done.stderr)
    return float(empty), float(full)


async def execute(verifier: SandboxVerifier, name: str, codes: tuple[str, ...], lane: bool = True) -> Verdict:
    """Execute without remembering."""
    kind = server_kind(codes)
    verdict = await verifier.execute(name, codes, kind, prefix_keys(name, kind, codes), lane=lane)
    if not verdict.ok:
        raise RuntimeError(f"{codes[-1]!r}: {verdict}")
    return verdict


async def throughput(verifier: SandboxVerifier, root: str, step: str, count: int, lane: bool) -> float:
    """Seconds an execution takes when 16 siblings are asked for at a time."""
    name = f"throughput {step} {lane}"
    await execute(verifier, name, (root,), lane)
    for begin in (-32, 0):
        start = time.perf_counter()
        for first in range(begin, count if begin == 0 else 0, 16):
            numbers = range(first, first + 16)
            steps = [step.replace("{i}", str(i)) for i in numbers]
            await asyncio.gather(*(execute(verifier, name, (root, code), lane) for code in steps))
    return (time.perf_counter() - start) / count


async def latency(verifier: SandboxVerifier, count: int) -> tuple[float, float]:
    """p50 and p99 of a trivial step asked for alone, in a process of its own, seconds."""
    await execute(verifier, "latency", ("a = 3",), lane=False)
    times = []
    for i in range(count):
        start = time.perf_counter()
        await execute(verifier, "latency", ("a = 3", f"print(a + {i})"), lane=False)
        times.append(time.perf_counter() - start)
    cuts = statistics.quantiles(times, n=100)
    return cuts[49], cuts[98]


async def chain(verifier: SandboxVerifier, repeats: int) -> tuple[float, float]:
    """Seconds for a chain of steps continued from each parent, and with the prefix run again each time.

    Of each step the quickest of some repeats counts, so that other work on the machine does not.
    """
    incremental = rerun = 0.0
    for depth in range(1, len(CHAIN) + 1):
        continued, again = [], []
        for repeat in range(repeats):
            parent = f"chain {repeat}"
            start = time.perf_counter()
            await execute(verifier, parent, tuple(CHAIN[:depth]))
            middle = time.perf_counter()
            await execute(verifier, f"rerun {repeat} {depth}", ("\n".join(CHAIN[:depth]),))
            continued.append(middle - start)
            again.append(time.perf_counter() - middle)
        incremental += min(continued)
        rerun += min(again)
    return incremental, rerun


def private_bytes(pid: int) -> int:
    """Memory a process does not share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


async def snapshot_mb(count: int) -> float:
    """Memory that a stopped snapshot with a sympy state does not share, MB: the mean over solved quadratics,
    every other one with irrational roots, which take more of sympy."""
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    try:
        for i in range(count):
            constant = i - 1 if i % 2 else 1
            code = f"from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - {i}*x + {constant}, x))"
            await execute(verifier, f"memory {i}", (code,))
        private = 0
        for pid in [pid for pid, state in descendants().items() if state == "T"]:
            try:
                private += private_bytes(pid)
            except PermissionError:  # Not dumpable: only root may look, others take the supervisor's estimate.
                return float((await verifier.stats())["snapshot_bytes"]) / count / 1e6
        return private / count / 1e6
    finally:
        await verifier.close()


async def overshoot(verifier: SandboxVerifier, count: int) -> float:
    """Largest time by which a spinning step outlives its limit, seconds of CPU."""
    limit = 0.2
    worst = 0.0
    for i in range(count):
        codes = (f"# {i}\nwhile True: pass",)
        keys = prefix_keys("spin", "light", codes)
        verdict = await verifier.execute("spin", codes, "light", keys, cpu_s=limit, wall_s=5.0)
        worst = max(worst, verdict.cpu_s - limit)
    return worst


async def measure() -> dict[str, Any]:
    """Everything, as one flat record."""
    record: dict[str, Any] = {}
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    try:
        record["layers"] = (await verifier.describe())["tier"]
        for name, (root, step) in STEPS.items():
            count = 480 if name == "trivial" else 160
            empty, bare = floor(server_kind((root, step)), root, step, count)
            seconds = await throughput(verifier, root, step, count, lane=True)
            record[f"{name}_per_s"] = 1 / seconds
            record[f"{name}_floor_fork_ms"] = empty * 1e3
            record[f"{name}_floor_step_ms"] = bare * 1e3
            record[f"{name}_ratio"] = seconds / bare
            if name == "trivial":
                alone = await throughput(verifier, root, step, count, lane=False)
                record["trivial_own_process_per_s"] = 1 / alone
                record["trivial_own_process_ratio"] = alone / bare
        p50, p99 = await latency(verifier, 300)
        record["trivial_p50_ms"], record["trivial_p99_ms"] = p50 * 1e3, p99 * 1e3
        incremental, rerun = await chain(verifier, 6)
        record["chain_ms"], record["chain_rerun_ms"] = incremental * 1e3, rerun * 1e3
        record["chain_ratio"] = rerun / incremental
        record["overshoot_ms"] = await overshoot(verifier, 10) * 1e3
    finally:
        await verifier.close()
    record["snapshot_mb"] = await snapshot_mb(60)
    return record


GOALS = (
    Goal("trivial_ratio", "at most", 1.5),
    Goal("numpy_ratio", "at most", 1.5),
    Goal("sympy_ratio", "at most", 1.5),
    Goal("chain_ratio", "at least", 2.5),
    Goal("snapshot_mb", "at most", 8.0),
    Goal("overshoot_ms", "at most", 50.0),
)


def main() -> int:
    arguments = parser("verifier", __doc__).parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return finish(asyncio.run(measure()), GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
