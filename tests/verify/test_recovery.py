# ruff: noqa: ASYNC220, ASYNC240, ASYNC251
"""What happens when states are evicted and processes die: replay, restart, nothing left over."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evolve.schema import VerifierConfig
from evolve.types import Status
from evolve.verify.link import Link
from evolve.verify.remembered import ENTRY_BYTES, Remembered
from evolve.verify.selftest import descendants
from evolve.verify.service import SandboxVerifier
from tests.verify.support import problem

pytestmark = pytest.mark.asyncio(loop_scope="module")
REPOSITORY = Path(__file__).parents[2]


async def test_an_evicted_prefix_is_replayed_and_the_verdict_says_so() -> None:
    small = SandboxVerifier(VerifierConfig(supervisors=1, snapshot_mb=16))
    try:
        p = problem()
        root = "import sympy\nx = sympy.symbols('x')\nprint('root')"
        await small.check(p, (), root)
        for i in range(12):
            await small.check(problem(), (), f"import sympy\nb = bytearray(10**6)\nsympy.sqrt({i})")
        verdict = await small.check(p, (root,), "print(sympy.solve(x - 3, x))")
        assert (await small.stats())["evictions"] > 0
    finally:
        await small.close()
    assert (verdict.stdout, verdict.replayed, verdict.deterministic) == ("[3]\n", True, True)


async def test_a_prefix_that_prints_something_else_when_replayed_is_called_nondeterministic() -> None:
    small = SandboxVerifier(VerifierConfig(supervisors=1, snapshot_mb=16))
    try:
        p, root = problem(), "import os, sympy\nprint(os.urandom(8))"
        await small.check(p, (), root)
        for i in range(12):
            await small.check(problem(), (), f"import sympy\nb = bytearray(10**6)\nsympy.sqrt({i})")
        verdict = await small.check(p, (root,), "print(1)")
    finally:
        await small.close()
    assert (verdict.stdout, verdict.replayed, verdict.deterministic) == ("1\n", True, False)


async def test_a_prefix_never_run_before_is_run(verifier: SandboxVerifier) -> None:
    verdict = await verifier.check(problem(), ("import math\na = [3]", "b = a[0] + 1"), "print(b)")
    assert (verdict.status, verdict.stdout, verdict.replayed) == (Status.OK, "4\n", True)


async def test_a_prefix_that_fails_is_said_to(verifier: SandboxVerifier) -> None:
    verdict = await verifier.check(problem(), ("a = []", "a[3]"), "print(1)")
    assert (verdict.status, verdict.exception) == (Status.ERROR, "IndexError")
    assert "step 2 of the prefix" in verdict.message


def processes(name: str) -> list[int]:
    """Processes below this one whose command line has `name`."""
    found = []
    for pid in descendants():
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.encode() in text:
            found.append(pid)
    return found


async def test_requests_survive_the_death_of_interpreter_servers_and_supervisors() -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    try:
        p, root = problem(), "import sympy\na = [20]"
        assert (await verifier.check(p, (), root)).ok
        for victim, start in (("servers", 100), ("supervisor", 200)):
            work = [
                asyncio.ensure_future(verifier.check(p, (root,), f"import time\ntime.sleep(0.1)\nprint(a[0] + {i})"))
                for i in range(start, start + 12)
            ]
            await asyncio.sleep(0.15)
            supervisor = verifier._links[0].process
            assert supervisor is not None
            servers = [pid for pid in processes("zygote.main") if _has_ancestor(pid, supervisor.pid)]
            assert servers
            for pid in [supervisor.pid] if victim == "supervisor" else servers:
                with contextlib.suppress(ProcessLookupError):  # One server's processes end with its first.
                    os.kill(pid, signal.SIGKILL)
            verdicts = await asyncio.wait_for(asyncio.gather(*work), 60)
            assert {v.status for v in verdicts} == {Status.OK}
            assert [v.stdout for v in verdicts] == [f"{start + 20 + i}\n" for i in range(12)]
        stats = await verifier.stats()
        assert stats["supervisor_restarts"] == 1
    finally:
        await verifier.close()


async def test_nothing_is_left_over_after_close() -> None:
    before = set(descendants())
    verifier = SandboxVerifier(VerifierConfig(supervisors=2))
    await verifier.check_many([(problem(), (), f"a = [{i}]") for i in range(20)])
    slow = [asyncio.ensure_future(verifier.check(problem(), (), "while True: pass")) for _ in range(4)]
    await asyncio.sleep(0.2)
    await verifier.close()
    assert all(isinstance(r, RuntimeError) for r in await asyncio.gather(*slow, return_exceptions=True))
    assert set(descendants()) <= before


async def test_a_start_that_fails_halfway_leaves_nothing_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(descendants())
    verifier = SandboxVerifier(VerifierConfig(supervisors=2))
    launch, launched = verifier._launch, []

    async def second_fails(link: Link) -> None:
        if launched:
            raise OSError("no descriptors just now")
        await launch(link)
        launched.append(link)

    with monkeypatch.context() as patched:
        patched.setattr(verifier, "_launch", second_fails)
        with pytest.raises(OSError, match="just now"):
            await verifier.start()
        await asyncio.sleep(0.1)
    try:
        assert set(descendants()) <= before
        assert (await verifier.check(problem(), (), "print(1)")).stdout == "1\n"
        assert (await verifier.stats()).get("supervisor_restarts", 0) == 0
    finally:
        await verifier.close()
    assert set(descendants()) <= before


async def test_what_is_remembered_is_bounded_in_bytes_least_recently_used_first() -> None:
    cache: Remembered[int] = Remembered(10 * ENTRY_BYTES)
    for number in range(20):
        cache.put(f"{number}", number)
        assert cache.get("0") == 0
    assert (len(cache), cache.bytes, cache.get("1"), cache.get("19")) == (10, 10 * ENTRY_BYTES, None, 19)
    cache.put("long", 1, 2 * ENTRY_BYTES)
    assert (len(cache), cache.bytes, cache.get("19")) == (2, 10 * ENTRY_BYTES, 19)
    cache.put("long", 2)
    assert (len(cache), cache.bytes, cache.get("long")) == (2, 2 * ENTRY_BYTES, 2)
    cache.put("longest", 3, 100 * ENTRY_BYTES)
    assert (len(cache), cache.get("longest")) == (1, 3)


OWNER = """
import asyncio, sys
from evolve.schema import VerifierConfig
from evolve.types import Problem
from evolve.verify.service import SandboxVerifier

async def main():
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    await verifier.check(Problem("p", "", ()), (), "import sympy\\na = [1]")
    print("ready", flush=True)
    await verifier.check(Problem("p", "", ()), (), "while True: pass")

asyncio.run(main())
"""


async def test_nothing_is_left_over_when_the_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=REPOSITORY) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        below = [pid for pid in descendants() if pid != owner.pid and _has_ancestor(pid, owner.pid)]
        assert len(below) >= 4
        owner.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []


def _has_ancestor(pid: int, ancestor: int) -> bool:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid == ancestor:
            return True
    return False


async def test_the_memory_of_large_arrays_counts(verifier: SandboxVerifier) -> None:
    before = (await verifier.stats()).get("snapshot_bytes", 0)
    assert (await verifier.check(problem(), (), "import numpy\nlarge = numpy.ones(5 * 10**6)")).ok
    assert (await verifier.stats())["snapshot_bytes"] - before > 40e6


async def test_a_prefix_that_is_replayed_in_another_interpreter_is_compared(verifier: SandboxVerifier) -> None:
    p, root = problem(), "import time\nprint(time.time_ns())"
    assert (await verifier.check(p, (), root)).ok
    later = await verifier.check(p, (root,), "import sympy\nprint(1)")
    assert (later.stdout, later.replayed, later.deterministic) == ("1\n", True, False)
    same = problem()
    assert (await verifier.check(same, (), "print(0.5)")).ok
    later = await verifier.check(same, ("print(0.5)",), "import sympy\nprint(1)")
    assert (later.replayed, later.deterministic) == (True, True)


@pytest.mark.parametrize(
    ("failure", "status"), [("raise ValueError('now')", Status.ERROR), ("while True: pass", Status.INFRASTRUCTURE)]
)
async def test_a_replay_that_fails_is_not_laid_to_the_new_step(failure: str, status: Status) -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1, cpu_s=0.3))
    try:
        p, root = problem(), f"import sys\nif 'numpy' in sys.modules:\n    {failure}"
        assert (await verifier.check(p, (), root)).ok
        verdict = await verifier.check(p, (root,), "import numpy")
        again = await verifier.check(p, (root,), "import numpy")
        repeated = (await verifier.stats()).get("repeated", 0)
    finally:
        await verifier.close()
    assert (verdict.status, again.status, repeated) == (status, status, 0)
    assert "step 1 of the prefix" in verdict.message
    if status is Status.ERROR:
        assert (verdict.replayed, verdict.deterministic) == (True, False)
