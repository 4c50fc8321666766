"""Ten thousand executions, one in a hundred hostile, leave nothing behind."""

import asyncio
import os
import random
from pathlib import Path

from evolve.schema import VerifierConfig
from evolve.types import Problem, Status
from evolve.verify.selftest import descendants
from evolve.verify.service import SandboxVerifier

HOSTILE = [
    ("while True: pass  # {i}", {Status.TIMEOUT}),
    ("import os  # {i}\nos._exit(0)", {Status.CRASH}),
    ("import os  # {i}\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", {Status.CRASH}),
    (
        "import os  # {i}\nfor fd in range(3, 9):\n    try:\n"
        "        os.write(fd, b'H')\n    except OSError:\n        pass",
        {Status.REFUSED},
    ),
    ("x = [{i}]\nwhile True:\n    x.append(b'a' * 10**7)", {Status.ERROR}),
]  # fmt: skip
EXECUTIONS = 10_000
CONCURRENT = 32


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def request(number: int, rng: random.Random) -> tuple[str, tuple[str, ...], str, set[Status], str | None]:
    """Problem id, prefix, step, statuses that are right, and the right output."""
    name = f"p{number // 40}"
    if number % 100 == 99:
        code, statuses = rng.choice(HOSTILE)
        return name, (), code.replace("{i}", str(number)), statuses, None
    a = rng.randrange(1000)
    kind = number % 20
    if kind < 14:
        return name, (f"a = {number // 40}",), f"print(a + {number})", {Status.OK}, f"{number // 40 + number}\n"
    if kind < 18:
        return name, ("s = [1]",), f"s.append({a})  # {number}\nprint(s)", {Status.OK}, f"[1, {a}]\n"
    root = "from sympy import symbols, solve\nx = symbols('x')"
    return name, (root,), f"print(solve(x - {number}, x))", {Status.OK}, f"[{number}]\n"


async def test_ten_thousand_executions_leave_nothing_behind() -> None:
    before, own = set(descendants()), descriptors(os.getpid())
    # None of them sleeps, so that wall time says only how busy the machine is; and to fill the memory takes CPU time.
    verifier = SandboxVerifier(VerifierConfig(supervisors=2, cpu_s=0.5, wall_s=120.0, memory_mb=400, snapshot_mb=64))
    rng = random.Random(0)
    gate = asyncio.Semaphore(CONCURRENT)
    wrong: list[object] = []

    async def one(number: int) -> None:
        name, parent, step, statuses, output = request(number, rng)
        async with gate:
            verdict = await verifier.check(Problem(name, "", ()), parent, step)
        if verdict.status not in statuses or (output is not None and verdict.stdout != output):
            wrong.append((number, step, verdict))

    try:
        await asyncio.gather(*(one(number) for number in range(1000)))
        supervisors = [link.process.pid for link in verifier._links if link.process is not None]
        early = [resident_mb(pid) for pid in supervisors]
        await asyncio.gather(*(one(number) for number in range(1000, EXECUTIONS)))
        await asyncio.sleep(0.2)
        stats = await verifier.stats()
        assert wrong == []
        assert stats.get("infrastructure", 0) == 0
        states = descendants()
        assert sum(state == "T" for pid, state in states.items() if pid not in before) == stats["snapshots"]
        assert not [pid for pid, state in states.items() if state == "Z"]
        # Two descriptors a snapshot (channel, pidfd), and a few dozen of the supervisor's own.
        assert sum(map(descriptors, supervisors)) <= 2 * stats["snapshots"] + 60 * len(supervisors)
        assert all(resident_mb(pid) - start < 60 for pid, start in zip(supervisors, early, strict=True))
    finally:
        await verifier.close()
    assert set(descendants()) <= before
    assert descriptors(os.getpid()) <= own + 1
