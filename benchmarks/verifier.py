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
from evolve.types import Status, Verdict
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

CHAINS = {
    "prealgebra": [
        "from sympy import Eq, Rational, solve, symbols\nx = symbols('x')",
        "share = Rational(3, 8) + Rational(1, 6)\nprint(share)",
        "left = 1 - share\nprint(left)",
        "price = Rational(45, 2) * (1 - Rational(20, 100))\nprint(price)",
        "n = solve(Eq(3*x/4 - 5, 16), x)[0]\nprint(n)",
        "mean = Rational(sum([12, 15, 18, n]), 4)\nprint(mean)",
        "speed = Rational(150, 1) / Rational(5, 2)\nprint(speed)",
        "answer = left * speed + mean\nprint(answer)",
    ],
    "algebra": [
        "from sympy import Eq, simplify, solve, sqrt, symbols\na, b, x = symbols('a b x')",
        "f = x**2 + a*x + b\nprint(f)",
        "equations = [Eq(f.subs(x, 2), 5), Eq(f.subs(x, -1), 8)]\nprint(equations)",
        "s = solve(equations, [a, b])\nprint(s)",
        "g = f.subs(s)\nprint(g)",
        "roots = solve(Eq(g, 0), x)\nprint(roots)",
        "cubes = simplify(roots[0]**3 + roots[1]**3)\nprint(cubes)",
        "answer = simplify(cubes - roots[0]*roots[1])\nprint(answer)",
    ],
    "intermediate algebra": [
        "from sympy import *\nx = symbols('x', real=True)",
        "p = Poly(x**4 - 5*x**3 + 5*x**2 + 5*x - 6, x)\nprint(p.degree())",
        "print(factor(p.as_expr()))",
        "zeros = roots(p)\nprint(zeros)",
        "q = cancel((x**3 - 1)/(x**2 - 1))\nprint(q)",
        "parts = apart((3*x + 5)/(x**2 - x - 2), x)\nprint(parts)",
        "where = solve_univariate_inequality((x - 1)*(x - 4)/(x + 2) < 0, x, relational=False)\nprint(where)",
        "answer = sum(zeros) + where.sup\nprint(answer)",
    ],
    "precalculus": [
        "from sympy import *\nt = symbols('t', real=True)",
        "triple = expand_trig(sin(3*t))\nprint(triple)",
        "zero = simplify(triple - 3*sin(t) + 4*sin(t)**3)\nprint(zero)",
        "angles = solveset(2*cos(t)**2 - 3*cos(t) + 1, t, Interval.Ropen(0, 2*pi))\nprint(angles)",
        "z = expand((1 + sqrt(3)*I)**6)\nprint(z)",
        "R = Matrix([[cos(pi/6), -sin(pi/6)], [sin(pi/6), cos(pi/6)]])\nprint(simplify(R**3))",
        "v = Matrix([1, 2, 2]).cross(Matrix([3, -1, 1]))\nprint(v.norm())",
        "answer = simplify(v.norm()**2 + re(z))\nprint(answer)",
    ],
    "calculus": [
        "from sympy import *\nx, y = symbols('x y')",
        "f = expand((x + 1)**3 * (x - 2))",
        "g = diff(f, x)\nprint(g)",
        "roots = solve(g, x)\nprint(roots)",
        "values = [f.subs(x, r) for r in roots]\nprint(values)",
        "area = integrate(f, (x, 0, 2))\nprint(area)",
        "s = solve([x + y - 5, x - y - 1], [x, y])\nprint(s)",
        "answer = simplify(area + s[x] * s[y])\nprint(answer)",
    ],
    "geometry": [
        "from sympy import *\nA, B, C = Point(0, 0), Point(6, 0), Point(2, 5)",
        "triangle = Triangle(A, B, C)\nprint(triangle.area)",
        "r = simplify(triangle.inradius)\nprint(r)",
        "R = simplify(triangle.circumradius)\nprint(R)",
        "d = Line(A, C).distance(B)\nprint(d)",
        "cuts = Circle(A, 3).intersection(Line(Point(0, 1), Point(1, 2)))\nprint(cuts)",
        "h = symbols('h', positive=True)\nheight = solve(Eq(triangle.area, 3*h), h)[0]\nprint(height)",
        "answer = simplify(triangle.area / R + height)\nprint(answer)",
    ],
    "number theory": [
        "from sympy import *\nfrom sympy.ntheory.modular import crt",
        "f = factorint(2**20 - 1)\nprint(f)",
        "count = prod(e + 1 for e in f.values())\nprint(count)",
        "print(totient(1000), divisor_sigma(360), primepi(100))",
        "m, modulus = crt([7, 9, 11], [3, 5, 2])\nprint(m, modulus)",
        "r = pow(7, 100, 13)\nprint(r, n_order(7, 13))",
        "k = symbols('k', integer=True)\nfound = [n for n in range(1, 60) if (n**2 + 3*n + 2) % 7 == 0]\nprint(found)",
        "answer = m + count + r + len(found)\nprint(answer)",
    ],
    "counting": [
        "from sympy import *\nx = symbols('x')\nk = symbols('k', integer=True, nonnegative=True)",
        "ways = binomial(10, 4) - 2*binomial(8, 3)\nprint(ways)",
        "p = Rational(1, 3)\nchances = [binomial(6, j)*p**j*(1 - p)**(6 - j) for j in range(7)]\nprint(chances)",
        "mean = sum(j*c for j, c in enumerate(chances))\nprint(mean)",
        "total = summation(k*binomial(5, k), (k, 0, 5))\nprint(total)",
        "coefficient = expand((1 + x + x**2)**6).coeff(x, 6)\nprint(coefficient)",
        "chance = Rational(coefficient, 3**6)\nprint(chance)",
        "answer = simplify(ways*chance + mean + total)\nprint(answer)",
    ],
}
"""A solution in eight steps for each subject of the MATH data set, and one from calculus."""
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
    verdict = await verifier.execute(name, codes, kind, prefix_keys(name, codes), lane=lane)
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


async def chain(verifier: SandboxVerifier, name: str, repeats: int) -> tuple[float, float]:
    """Seconds for a chain of steps continued from each parent, and with the prefix run again each time.

    Of each step the quickest of some repeats counts, so that other work on the machine does not.
    """
    steps = CHAINS[name]
    incremental = rerun = 0.0
    for depth in range(1, len(steps) + 1):
        continued, again = [], []
        for repeat in range(repeats):
            start = time.perf_counter()
            await execute(verifier, f"{name} {repeat}", tuple(steps[:depth]))
            middle = time.perf_counter()
            await execute(verifier, f"rerun {name} {repeat} {depth}", ("\n".join(steps[:depth]),))
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


async def overshoot(verifier: SandboxVerifier, count: int) -> tuple[float, float]:
    """Largest times by which a spinning step outlives its limit, seconds of CPU, and a sleeping one, of wall time."""
    limit = 0.2
    spinning = sleeping = 0.0
    for i in range(count):
        for code in (f"# {i}\nwhile True: pass", f"import time  # {i}\ntime.sleep(60)"):
            spins = "while" in code
            keys = prefix_keys("overshoot", (code,))
            cap = 5.0 if spins else limit
            verdict = await verifier.execute("overshoot", (code,), "light", keys, cpu_s=limit, wall_s=cap)
            if verdict.status is not Status.TIMEOUT:
                raise RuntimeError(f"{code!r}: {verdict}")
            if spins:
                spinning = max(spinning, verdict.cpu_s - limit)
            else:
                sleeping = max(sleeping, verdict.wall_s - limit)
    return spinning, sleeping


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
        times = {name: await chain(verifier, name, 6) for name in CHAINS}
        record |= {f"chain_{name}_ratio": rerun / incremental for name, (incremental, rerun) in times.items()}
        incremental, rerun = (sum(each) for each in zip(*times.values(), strict=True))
        record["chains_ms"], record["chains_rerun_ms"] = incremental * 1e3, rerun * 1e3
        record["chains_ratio"] = rerun / incremental
        spinning, sleeping = await overshoot(verifier, 10)
        record["overshoot_ms"], record["overshoot_sleeping_ms"] = spinning * 1e3, sleeping * 1e3
    finally:
        await verifier.close()
    record["snapshot_mb"] = await snapshot_mb(60)
    return record


GOALS = (
    Goal("trivial_ratio", "at most", 1.5),
    Goal("numpy_ratio", "at most", 1.5),
    Goal("sympy_ratio", "at most", 1.5),
    Goal("chains_ratio", "at least", 2.5),
    Goal("snapshot_mb", "at most", 8.0),
    Goal("overshoot_ms", "at most", 50.0),
    Goal("overshoot_sleeping_ms", "at most", 50.0),
)


def main() -> int:
    arguments = parser("verifier", __doc__).parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return finish(asyncio.run(measure()), GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
