"""What the machine or the sandbox does to a step is not called the step's doing; what its code does is."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.schema import VerifierConfig
from evolve.types import Problem, Status, Verdict
from evolve.verify.layers import detect, without
from evolve.verify.nodes import Job, Node
from evolve.verify.runner import Runner
from evolve.verify.service import SandboxVerifier
from evolve.verify.snapshots import Snapshots
from evolve.verify.steps import prefix_keys
from tests.verify.support import exit_status_is_known, problem, sandboxed

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPOSITORY = Path(__file__).parents[2]

PATCHED = (
    "import errno, os, sys, time\nharness = sys.modules['zygote']\nfork = harness._fork\n{}\nharness._fork = patched"
)
"""A prefix after which forks go through a function `patched`, to be defined in it."""


async def asleep_beside(before: set[int]) -> int:
    """A process in a sandbox that is not of `before` and sleeps, once there is one."""
    async with asyncio.timeout(60):
        while True:
            new = [pid for pid, status in sandboxed().items() if pid not in before and status == "sleeping"]
            if new:
                return new[0]
            await asyncio.sleep(0.005)


async def killed(verifier: SandboxVerifier, p: Problem, step: str, times: int) -> Verdict:
    """The verdict on a step that ends with a sleep and is killed from outside `times` times."""
    before = set(sandboxed())
    slow = asyncio.ensure_future(verifier.check(p, ("a = [7]",), step))
    for _ in range(times):
        pid = await asleep_beside(before)
        # Nothing but the out-of-memory killer sends SIGKILL from outside: this stands in for it.
        os.kill(pid, signal.SIGKILL)
        before.add(pid)
    return await slow


@pytest.mark.parametrize("layer", ["cgroup", None])
async def test_a_step_that_is_killed_from_outside_is_run_again_and_never_labelled(layer: str | None) -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1), without(detect(), *filter(None, [layer])))
    try:
        p = problem()
        await verifier.check(p, (), "a = [7]")
        once = await killed(verifier, p, "import time\ntime.sleep(0.5)\nprint(a)", 1)
        if exit_status_is_known():
            always = await killed(verifier, p, "import time\ntime.sleep(5)", 3)
            assert always.status is Status.INFRASTRUCTURE
        after = await verifier.check(p, ("a = [7]",), "print(a)")
    finally:
        await verifier.close()
    assert (once.status, once.stdout, after.stdout) == (Status.OK, "[7]\n", "[7]\n")


@pytest.mark.skipif(not exit_status_is_known(), reason="this kernel does not tell (before Linux 6.15)")
async def test_a_step_near_its_memory_limit_that_is_killed_twice_is_called_so() -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1, memory_mb=256), without(detect(), "cgroup"))
    try:
        p = problem()
        await verifier.check(p, (), "a = [7]")
        spin = "end = time.process_time() + 0.3\nwhile time.process_time() < end:\n    pass\n"
        step = f"import time\nheld = b'x' * (200 << 20)\n{spin}time.sleep(5)"
        verdict = await killed(verifier, p, step, 2)
    finally:
        await verifier.close()
    assert (verdict.status, "memory" in verdict.message) == (Status.OOM, True)


async def test_a_state_that_is_killed_while_it_forks_is_made_again(verifier: SandboxVerifier) -> None:
    p, root = problem(), PATCHED.format("def patched():\n    time.sleep(0.5)\n    return fork()")
    before = set(sandboxed())
    await verifier.check(p, (), root)
    child = asyncio.ensure_future(verifier.check(p, (root,), "print('child')"))
    os.kill(await asleep_beside(before), signal.SIGKILL)
    verdict = await child
    assert (verdict.status, verdict.stdout, verdict.replayed) == (Status.OK, "child\n", True)


async def test_a_state_that_cannot_fork_for_want_of_memory_is_no_label(verifier: SandboxVerifier) -> None:
    # A fork that fails in the kernel has passed the gate: let one through whose child ends at once.
    body = f"def patched():\n    fork() or os._exit(0)\n    raise OSError({errno.EAGAIN}, 'full')"
    p, root = problem(), PATCHED.format(body)
    await verifier.check(p, (), root)
    verdict = await verifier.check(p, (root,), "print(1)")
    after = await verifier.check(p, (), "print(2)")
    assert (verdict.status, after.stdout) == (Status.INFRASTRUCTURE, "2\n")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("def patched():\n    os._exit(3)", Status.CRASH),
        ("def patched():\n    return 1", Status.CRASH),
        ("def patched():\n    time.sleep(60)", Status.TIMEOUT),
        ("def patched():\n    while True:\n        pass", Status.TIMEOUT),
        ("def patched():\n    if fork():\n        return 1\n    time.sleep(60)", Status.TIMEOUT),
        ("def patched():\n    if fork():\n        return 1\n    while True:\n        pass", Status.TIMEOUT),
    ],
    ids=["exits", "pretends", "sleeps", "spins", "child_sleeps", "child_spins"],
)
async def test_code_that_keeps_its_state_from_forking_twice_is_called_so(
    verifier: SandboxVerifier, body: str, status: Status
) -> None:
    if "_exit" in body and not exit_status_is_known():
        pytest.skip("this kernel does not tell what a process died of (before Linux 6.15)")
    name, codes = problem().id, (PATCHED.format(body), "print(1)")
    keys = prefix_keys(name, codes)
    assert (await verifier.execute(name, codes[:1], "light", keys[:1])).ok
    verdict = await verifier.execute(name, codes, "light", keys, 0.3, 0.6)
    assert verdict.status is status


FORGE = """import os, stat
for fd in range(3, 16):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.write(fd, b'R{"s":"ok","o":"","t":false}')
            break
    except OSError:
        pass
"""
"""A prefix that reports itself before it has ended."""


@pytest.mark.parametrize(
    ("end", "statuses"),
    [
        ("", {Status.REFUSED}),
        ("os._exit(0)", {Status.CRASH}),
        ("import ctypes\nctypes.string_at(0)", {Status.CRASH}),
        ("while True:\n    pass", {Status.TIMEOUT}),
    ],
    ids=["reports_again", "exits", "crashes", "spins"],
)
async def test_what_continues_from_a_forged_state_gets_a_verdict(
    verifier: SandboxVerifier, end: str, statuses: set[Status]
) -> None:
    name, codes = problem().id, (FORGE + end, "print(1)")
    keys = prefix_keys(name, codes)
    for _ in range(2):
        verdict = await verifier.execute(name, codes, "light", keys, 0.3, 0.6)
        assert verdict.status in statuses


async def test_limits_that_would_look_like_the_machines_doing_cannot_be_set(verifier: SandboxVerifier) -> None:
    for name in ("RLIMIT_CPU", "RLIMIT_NPROC", "RLIMIT_AS"):
        p, code = problem(), f"import resource\nresource.setrlimit(resource.{name}, (1, 1))\nwhile True: pass"
        assert (await verifier.check(p, (), code)).exception == "ValueError"
        caught = f"try:\n    import resource\n    resource.setrlimit(resource.{name}, (0, 0))\nexcept ValueError: pass"
        for parent in ((), ("import math",)):
            assert (await verifier.check(p, parent, caught)).ok
            assert (await verifier.check(p, (*parent, caught), "print(1)")).stdout == "1\n"


async def test_a_state_made_twice_at_once_keeps_the_one_that_may_be_forking() -> None:
    owner: Any = SimpleNamespace(owners={})
    server: Any = SimpleNamespace(forget=lambda pid: None)
    runner = Runner(owner, 64)
    request = {"i": 0, "k": "light", "o": "C", "c": ["a = 1"], "h": ["k"], "cpu": 1.0, "wall": 1.0}
    nodes = [Node(server, None, Job(request), channel) for channel in socket.socketpair()]
    nodes[0].forking = 1
    for node in nodes:
        runner._keep(node)
    assert list(runner.live) == nodes[:1]
    assert [node.channel.fileno() >= 0 for node in nodes] == [True, False]
    nodes[0].channel.close()


async def test_the_memory_of_an_evicted_state_counts_while_states_that_share_it_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evolve.verify.snapshots.private_bytes", lambda pid: 40)
    live = Snapshots(100, 99)
    server: Any = None
    channel: Any = None

    def forked(key: str, parent: Node | None, keep: bool = True) -> Node:
        request = {"i": 0, "k": "light", "o": "C", "c": ["a = 1"], "h": [key], "cpu": 1.0, "wall": 1.0}
        node = Node(server, parent, Job(request), channel)
        if keep:
            live.add(node)
        return node

    root = forked("root", None)
    child = forked("child", root)
    running = forked("running", child, keep=False)
    forked("other", None)
    evicted = []
    for node in live.surplus():
        evicted.append(node)
        live.discard(node)
        live.discard(node)
    assert (evicted, live.memory) == ([root, child], 120)
    live.discard(running)
    assert live.memory == 40


async def test_long_steps_after_one_state_wait_for_each_other(verifier: SandboxVerifier) -> None:
    p, root = problem(), "import math\nx = [1]"
    await verifier.check(p, (), root)
    long = f"import math\ny = '{'é' * 60_000}'\nx.append(0)\n"
    verdicts = await verifier.check_many([(p, (root,), f"{long}print(len(x), {i})") for i in range(12)])
    assert [verdict.stdout for verdict in verdicts] == [f"2 {i}\n" for i in range(12)]


async def test_a_long_step_after_states_of_the_lane_fits_its_packet() -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    try:
        p, long = problem(), f"y = ['{'é' * 60_000}']"
        assert (await verifier.check(p, (), "a = 1 + 1")).ok
        verdict = await verifier.check(p, ("a = 1 + 1", long), "print(a, len(y[0]))")
        assert (await verifier.stats())["lane"] == 1
    finally:
        await verifier.close()
    assert verdict.stdout == "2 60000\n"


async def test_what_is_longer_than_a_packet_is_refused(verifier: SandboxVerifier) -> None:
    before = await verifier.stats()
    outcome = await verifier._compare("long", "G", [["7", "x" * 300_000]])
    after = await verifier.stats()
    grown = [after.get(name, 0) - before.get(name, 0) for name in ("refused", "sandbox_failures")]
    assert (outcome, grown) == (None, [1, 0])


SWEEPS = """
import os, subprocess
from types import SimpleNamespace
from evolve.verify.nodes import Job, Node
from evolve.verify.runner import Runner

lane = SimpleNamespace(pid=0, starting=False)
runner = Runner(SimpleNamespace(owners={}, servers={}, counts={"strays": 0}, lane=lane), 64)
request = {"i": 0, "k": "light", "o": "C", "c": ["a = 1"], "h": ["k"], "cpu": 1.0, "wall": 1.0}
for pid in (1 << 30, os.getpid()):
    node = Node(SimpleNamespace(pid=pid), None, Job(request), None)
    stray = subprocess.Popen(["sleep", "60"])
    runner.active = {node}
    node.checked = float("inf")
    runner.sweep()
    print(runner.sweep_at is not None)
    if runner.sweep_at is not None:
        runner.active.clear()
        runner.sweep_at = 0.0
        runner.check_limits()
    print(stray.wait(30))
"""


async def test_a_sweep_takes_what_no_starting_node_can_be_and_comes_again_for_the_rest() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SWEEPS], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout.split() == ["False", "-9", "True", "-9"], done.stderr
