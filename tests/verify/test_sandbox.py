# ruff: noqa: ASYNC220, ASYNC221, ASYNC240, ASYNC251
"""What executing steps promises: state, isolation, typed verdicts, limits, recovery, nothing left over."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from evolve.schema import VerifierConfig
from evolve.types import Problem, Status
from evolve.verify import cgroups, selftest
from evolve.verify.deaths import exit_status
from evolve.verify.layers import detect, without
from evolve.verify.selftest import SelfTest, descendants, load
from evolve.verify.service import SandboxVerifier

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTILE = Path(__file__).parent / "hostile.json"
CONFIG = VerifierConfig(supervisors=1, cpu_s=3.0, wall_s=60.0)
REPOSITORY = Path(__file__).parents[2]
_count = iter(range(10**9))


def problem() -> Problem:
    """A problem nobody has seen, so that nothing is remembered of it."""
    return Problem(f"p{next(_count)}", "q", ("7",))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verifier() -> AsyncIterator[SandboxVerifier]:
    verifier = SandboxVerifier(CONFIG)
    yield verifier
    await verifier.close()


async def test_a_child_continues_from_its_parents_live_state(verifier: SandboxVerifier) -> None:
    p = problem()
    first = "numbers = (n * n for n in range(9))\nnext(numbers)\ndouble = lambda x: 2 * x"
    assert (await verifier.check(p, (), first)).ok
    second = await verifier.check(p, (first,), "print(next(numbers), double(21))")
    assert (second.status, second.stdout, second.replayed) == (Status.OK, "1 42\n", False)


async def test_siblings_never_see_each_other(verifier: SandboxVerifier) -> None:
    p, root = problem(), "items = [1]\nimport math"
    await verifier.check(p, (), root)
    steps = [f"items.append({i})\nmath.pi = {i}\nprint(items, math.pi)" for i in range(2, 8)]
    verdicts = await verifier.check_many([(p, (root,), step) for step in steps])
    assert [v.stdout for v in verdicts] == [f"[1, {i}] {i}\n" for i in range(2, 8)]


async def test_problems_never_see_each_other(verifier: SandboxVerifier) -> None:
    await verifier.check(problem(), (), "leak = 1")
    verdict = await verifier.check(problem(), (), "print(leak)")
    assert (verdict.status, verdict.exception) == (Status.ERROR, "NameError")


async def test_an_exception_is_reported_with_type_message_and_line_of_its_own_step(
    verifier: SandboxVerifier,
) -> None:
    p, root = problem(), "def half(x):\n    return x / 2\n\n\ndef bad():\n    return 1 / 0"
    await verifier.check(p, (), root)
    verdict = await verifier.check(p, (root,), "a = half(3)\nprint(a)\nbad()")
    assert (verdict.status, verdict.exception, verdict.message) == (
        Status.ERROR,
        "ZeroDivisionError",
        "division by zero",
    )
    assert (verdict.line, verdict.stdout) == (3, "1.5\n")


async def test_printing_error_is_not_an_error_and_small_numbers_print_as_python_prints_them(
    verifier: SandboxVerifier,
) -> None:
    verdict = await verifier.check(problem(), (), "print('Error: relative error', 1.2e-5)")
    assert (verdict.status, verdict.stdout) == (Status.OK, "Error: relative error 1.2e-05\n")


@pytest.mark.parametrize(
    ("code", "status", "exception"),
    [
        ("", Status.OK, ""),
        ("   \n# only a comment", Status.OK, ""),
        ("a = = 1", Status.ERROR, "SyntaxError"),
        ("x = 'a\0b'", Status.ERROR, "SyntaxError"),
        ("print('\ud800')", Status.ERROR, "UnicodeEncodeError"),
        ("x = 1\n" * 170_000, Status.REFUSED, ""),
        ("café = 'é∑😀'\nprint(café)", Status.OK, ""),
        ("The answer is 5.", Status.ERROR, "SyntaxError"),
    ],
    ids=["empty", "comment", "syntax", "nul", "surrogate", "megabyte", "unicode", "prose"],
)
async def test_any_text_gets_a_verdict(verifier: SandboxVerifier, code: str, status: Status, exception: str) -> None:
    verdict = await verifier.check(problem(), (), code)
    assert (verdict.status, verdict.exception) == (status, exception)


async def test_output_is_capped_in_bytes_and_flagged(verifier: SandboxVerifier) -> None:
    exact = await verifier.check(problem(), (), "print('x' * 16383)")
    assert (len(exact.stdout), exact.truncated) == (16384, False)
    over = await verifier.check(problem(), (), "for _ in range(9000):\n    print('€')")
    assert over.truncated
    assert 16380 <= len(over.stdout.encode()) <= 16384


async def test_spinning_and_sleeping_end_at_their_limits(verifier: SandboxVerifier) -> None:
    quick = SandboxVerifier(VerifierConfig(supervisors=1, cpu_s=0.3, wall_s=8.0))
    try:
        spin = await quick.check(problem(), (), "while True:\n    pass")
        sleep = await quick.check(problem(), (), "import time\ntime.sleep(60)")
        tower = await quick.check(problem(), (), "x = 10 ** 10 ** 8")
    finally:
        await quick.close()
    assert [v.status for v in (spin, sleep, tower)] == [Status.TIMEOUT] * 3
    assert "CPU" in spin.message
    assert "wall" in sleep.message
    assert 0.3 <= spin.cpu_s < 1.0


async def test_memory_is_limited(verifier: SandboxVerifier) -> None:
    verdict = await verifier.check(problem(), (), "x = []\nwhile True:\n    x.append(b'a' * 10**7)")
    assert (verdict.status, verdict.exception) == (Status.ERROR, "MemoryError")


async def test_a_step_that_the_kernel_kills_for_its_memory_is_called_so(verifier: SandboxVerifier) -> None:
    p, root = problem(), "a = [7]"
    await verifier.check(p, (), root)
    before = set(descendants())
    slow = asyncio.ensure_future(verifier.check(p, (root,), "import time\ntime.sleep(5)"))
    await asyncio.sleep(1)
    new = [pid for pid, state in descendants().items() if pid not in before and state == "S"]
    # Nothing but the out-of-memory killer sends SIGKILL from outside: this stands in for it.
    os.kill(new[0], signal.SIGKILL)
    verdict = await slow
    if exit_status_is_known():
        assert (verdict.status, "memory" in verdict.message) == (Status.OOM, True)
    else:
        assert verdict.status is Status.CRASH
    assert (await verifier.check(p, (root,), "print(a)")).stdout == "[7]\n"


def exit_status_is_known() -> bool:
    """Whether this kernel tells what a process died of that is no child (Linux 6.15)."""
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
        process.wait()
    try:
        return exit_status(pidfd) == 0
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os, time\ntime.sleep(0.3)\nos._exit(3)", "exit status 3"),
        ("import ctypes, time\ntime.sleep(0.3)\nctypes.string_at(0)", "Segmentation"),
    ],
)
async def test_a_crash_says_what_the_interpreter_died_of(verifier: SandboxVerifier, code: str, word: str) -> None:
    # The code lives long enough for the supervisor to hold its pidfd; of one that dies before that no cause is known.
    verdict = await verifier.check(problem(), (), code)
    assert verdict.status is Status.CRASH
    assert word in verdict.message or not exit_status_is_known()


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


@pytest.mark.parametrize("concurrency", [1, 32])
async def test_hostile_snippets_get_nowhere(concurrency: int, capsys: pytest.CaptureFixture[str]) -> None:
    failed = await selftest.self_test(load(HOSTILE), concurrency)
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("seccomp", {"new_namespaces", "udp_and_unix_sockets", "rare_calls"}),
        ("limits", {"descriptors", "raise_limits", "string_doubling"}),
    ],
)
async def test_with_a_layer_removed_snippets_fail(layer: str, names: set[str]) -> None:
    test = SelfTest(VerifierConfig(supervisors=1), without(detect(), layer))
    chosen = [snippet for snippet in load(HOSTILE) if snippet.name in names]
    try:
        await test.prepare()
        reports = [await test.one(snippet, alone=False) for snippet in chosen]
    finally:
        await test.verifier.close()
    assert any(report.failures for report in reports)


async def test_with_file_system_layers_removed_the_machine_can_be_read() -> None:
    # Where the interpreter lies in a home directory, only its owner can run it without a mount namespace.
    layers = dataclasses.replace(without(detect(), "landlock", "namespaces"), uid=None)
    test = SelfTest(VerifierConfig(supervisors=1), layers)
    chosen = [snippet for snippet in load(HOSTILE) if snippet.name == "etc_files"]
    try:
        await test.prepare()
        reports = [await test.one(snippet, alone=False) for snippet in chosen]
    finally:
        await test.verifier.close()
    assert any("READ" in failure for report in reports for failure in report.failures)


async def test_a_control_group_holds_what_limits_of_a_process_let_through() -> None:
    layers = without(detect(), "limits")
    if layers.cgroup is None or not exit_status_is_known():
        pytest.skip("no memory control group can be made here, or the kernel does not tell of deaths")
    parent = Path(layers.cgroup)
    others = set(parent.glob("evolve-sandbox-*"))
    verifier = SandboxVerifier(
        VerifierConfig(supervisors=1, memory_mb=256, snapshot_mb=16, cpu_s=20, wall_s=200), layers
    )
    try:
        p = problem()
        await verifier.check(p, (), "a = [7]")
        hog = await verifier.check(p, ("a = [7]",), "x = []\nwhile True:\n    x.append(b'a' * 10**7)")
        after = await verifier.check(p, ("a = [7]",), "print(a)")
    finally:
        await verifier.close()
    assert (hog.status, "memory" in hog.message) == (Status.OOM, True)
    assert after.stdout == "[7]\n"
    cgroups.clear(parent, 30.0)  # The kernel may take its time over the dead on a busy machine.
    assert set(parent.glob("evolve-sandbox-*")) <= others


async def test_a_layer_that_is_missing_is_warned_of_once_and_said_by_describe() -> None:
    layers = dataclasses.replace(without(detect(), "cgroup"), missing=("memory control group: none here",))
    verifier = SandboxVerifier(VerifierConfig(supervisors=1), layers)
    try:
        with pytest.warns(RuntimeWarning, match="lacks a layer: memory control group"):
            found = await verifier.describe()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await verifier.describe()
    finally:
        await verifier.close()
    assert found["missing"] == ["memory control group: none here"]
    assert "cgroup" not in found["tier"]


AS_USER = """
mkdir "$1/base" && mount --bind "$2" "$1/base" && mount -t tmpfs -o mode=755 none /root &&
mkdir -p "$2" && mount --bind "$1/base" "$2" && cd "$3" && shift 3 &&
exec setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/ PYTHONDONTWRITEBYTECODE=1 "$@"
"""


async def test_hostile_snippets_get_nowhere_as_an_ordinary_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the other tests ran as an ordinary user already")
    base = str(Path(sys.base_prefix).resolve())
    if Path("/root") not in Path(base).parents:
        prefix = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "env", "HOME=/"]
    else:
        prefix = ["unshare", "-m", "sh", "-c", AS_USER, "sh", str(tmp_path), base, str(REPOSITORY)]
    command = [*prefix, sys.executable, "-m", "evolve.verify", "--self-test", "--concurrency", "32"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this container does not let root mount")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "uid" not in done.stdout.splitlines()[0]


async def test_the_command_line_runs_a_files_steps(tmp_path: Path) -> None:
    file = tmp_path / "steps.py"
    file.write_text(
        textwrap.dedent("""\
        <code>
        # Step 1: add.
        a = 3 + 4
        <end_of_step>
        print(a)
        <end_of_step>
        1 / 0
        <end_of_code>
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "evolve.verify", str(file)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        "step 1: ok",
        "step 2: ok",
        "7",
        "step 3: error: ZeroDivisionError division by zero line 1",
    ]
