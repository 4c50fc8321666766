# ruff: noqa: ASYNC221, ASYNC240
"""What executing a step promises: state, isolation from siblings, typed verdicts, limits."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.common import beside
from evolve.schema import VerifierConfig
from evolve.types import Status, Verdict
from evolve.verify.__main__ import split_steps
from evolve.verify.selftest import load
from evolve.verify.service import SandboxVerifier
from evolve.verify.steps import prefix_keys
from tests.verify.support import early_deaths_are_known, problem

pytestmark = pytest.mark.asyncio(loop_scope="module")
REPOSITORY = Path(__file__).parents[2]


async def test_a_child_continues_from_its_parents_live_state(verifier: SandboxVerifier) -> None:
    p = problem()
    first = "numbers = (n * n for n in range(9))\nnext(numbers)\ndouble = lambda x: 2 * x"
    assert (await verifier.check(p, (), first)).ok
    second = await verifier.check(p, (first,), "print(next(numbers), double(21))")
    assert (second.status, second.stdout, second.replayed) == (Status.OK, "1 42\n", False)


async def test_a_recursion_limit_is_kept_from_step_to_step(verifier: SandboxVerifier) -> None:
    p, root = problem(), "import sys\nsys.setrecursionlimit(20000)"
    function = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)"
    assert (await verifier.check(p, (), root)).ok
    assert (await verifier.check(p, (root,), function)).ok
    deep = await verifier.check(p, (root, function), "print(f(5000), sys.getrecursionlimit())")
    other = await verifier.check(problem(), (), "import sys\nprint(sys.getrecursionlimit())")
    assert (deep.status, deep.stdout, other.stdout) == (Status.OK, "5000 20000\n", "1000\n")


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


@pytest.mark.parametrize("place", ["", "import math\n"], ids=["lane", "process"])
async def test_lone_surrogates_become_replacement_characters(verifier: SandboxVerifier, place: str) -> None:
    printed = await verifier.check(problem(), (), place + "print('a\\ud800b\\udc00')")
    raised = await verifier.check(problem(), (), place + "float('\\udfff')")
    spoke = await verifier.check(problem(), (), place + "raise ValueError('\\ud800')")
    assert (printed.status, printed.stdout) == (Status.OK, "a\ufffdb\ufffd\n")
    assert spoke.message == "\ufffd"
    for verdict in (printed, raised, spoke):
        for text in (verdict.stdout, verdict.exception, verdict.message):
            text.encode()


async def test_output_is_capped_in_bytes_and_flagged(verifier: SandboxVerifier) -> None:
    exact = await verifier.check(problem(), (), "print('x' * 16383)")
    assert (len(exact.stdout), exact.truncated) == (16384, False)
    over = await verifier.check(problem(), (), "for _ in range(9000):\n    print('€')")
    assert over.truncated
    assert 16380 <= len(over.stdout.encode()) <= 16384


async def test_spinning_and_sleeping_end_at_their_limits(verifier: SandboxVerifier) -> None:
    async def run(code: str, cpu_s: float, wall_s: float) -> Verdict:
        name = problem().id
        return await verifier.execute(name, (code,), "light", prefix_keys(name, (code,)), cpu_s, wall_s)

    spin = await run("while True:\n    pass", 0.3, 60.0)
    sleep = await run("import time\ntime.sleep(60)", 5.0, 0.3)
    tower = await run("x = 10 ** 10 ** 8", 0.3, 60.0)
    assert [v.status for v in (spin, sleep, tower)] == [Status.TIMEOUT] * 3
    assert "CPU" in spin.message
    assert "wall" in sleep.message
    assert 0.3 <= spin.cpu_s < 1.0


@contextlib.contextmanager
def crowded_core(others: int) -> Iterator[None]:
    """One core for this process and what it starts meanwhile, which `others` that never rest share."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with beside([[sys.executable, "-c", "while True: pass"]] * others):
            yield
    finally:
        os.sched_setaffinity(0, cores)


async def test_time_in_which_a_step_waits_for_a_core_is_not_its_own() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count the time that processes wait for a core")
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end:\n    pass"
    sleep = "import time\ntime.sleep(60)"
    verifier = SandboxVerifier(VerifierConfig(supervisors=1, cpu_s=0.4, wall_s=0.5))
    try:
        with crowded_core(6):
            assert (await verifier.check(problem(), (), "import time")).ok
            spun, slept = await asyncio.gather(
                verifier.check(problem(), (), spin), verifier.check(problem(), (), sleep)
            )
    finally:
        await verifier.close()
    assert (spun.status, slept.status) == (Status.OK, Status.TIMEOUT)
    assert spun.wall_s > 0.5
    assert "wall" in slept.message


async def test_memory_is_limited(verifier: SandboxVerifier) -> None:
    verdict = await verifier.check(problem(), (), "x = []\nwhile True:\n    x.append(b'a' * 10**7)")
    assert (verdict.status, verdict.exception) == (Status.ERROR, "MemoryError")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os\nos._exit(3)", "exit status 3"),
        ("import ctypes\nctypes.string_at(0)", "Segmentation"),
    ],
)
async def test_a_crash_says_what_the_interpreter_died_of(verifier: SandboxVerifier, code: str, word: str) -> None:
    verdicts = [await verifier.check(problem(), (), code) for _ in range(10)]
    assert {verdict.status for verdict in verdicts} == {Status.CRASH}
    if early_deaths_are_known():
        assert all(word in verdict.message for verdict in verdicts)


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


async def test_the_flags_of_the_sandboxs_own_code_are_not_a_steps(verifier: SandboxVerifier) -> None:
    code = "class A:\n    x: int\nprint(A.__annotations__)\nprint(eval('1 + 1'))"
    assert (await verifier.check(problem(), (), code)).stdout == "{'x': <class 'int'>}\n2\n"


CODE = "\n<code>\na = 1\n<end_of_step># Next.\nb = 2\n<end_of_code>"
WHOLE = CODE + "\n<output>2<end_of_output>\n<answer>2<end_of_answer>"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (WHOLE, ["a = 1", "# Next.\nb = 2"]),
        ("a = 1 <end_of_step>\nb = 2", ["a = 1 ", "b = 2"]),
        ("print(1)\n# the tag <end_of_code> is not here\nprint(2)", None),
        ("s = '<code>'\nprint(len(s))", None),
        ("s = '<end_of_step>'\nprint(len(s))", None),
        ("", None),
    ],
)
async def test_a_files_boundaries_count_only_where_step_formats_put_them(text: str, steps: list[str] | None) -> None:
    assert split_steps(text) == ([text] if steps is None else steps)


async def test_what_follows_the_end_of_a_files_code_is_not_lost_silently() -> None:
    with pytest.raises(ValueError, match="line 3: only <output> and <answer> may follow <end_of_code>"):
        split_steps("print(1)\n<end_of_code>\nprint(2)")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": 2}, "'a': code is 2; it must be a string"),
        ({"expect": ["status_in"]}, "expect is .*; it must be an object"),
        (
            {"expect": {"status_in": ["ok"], "stdout_contian": ["x"]}},
            "unknown key expect.stdout_contian; it must",
        ),
        ({"expect": {"status_in": "ok"}}, "expect.status_in is 'ok'; it must be a list of strings"),
        ({"expect": {"status_in": ["fine"]}}, "unknown expect.status_in .*; they must be of .*oom"),
        ({"expect": {}}, "the key expect.status_in is missing"),
        ({"timeout": 2}, "unknown key timeout; it must be one of .*timeout_s"),
        ({"timeout_s": -1}, "timeout_s is -1; it must be a number above 0"),
    ],
)
async def test_a_senseless_snippets_file_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    file = tmp_path / "snippets.json"
    file.write_text(json.dumps([{"name": "a", "code": "print(1)", "expect": {"status_in": ["ok"]}, **changes}]))
    with pytest.raises(ValueError, match=said) as caught:
        load(file)
    assert str(file) in str(caught.value)


def verify(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evolve.verify", *arguments, str(file)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


async def test_the_command_line_escapes_what_a_step_says(tmp_path: Path) -> None:
    file = tmp_path / "steps.py"
    file.write_text("print('\\x1b[2J\\0é')\n<end_of_step>\nraise ValueError('\\ud800\\x1b\\nstep 3: ok')")
    done = await asyncio.to_thread(verify, file)
    assert (done.returncode, done.stderr) == (1, "")
    lines = [line.split(" (")[0] for line in done.stdout.splitlines()]
    said = "\\ufffd\\x1b\\nstep 3: ok"
    assert lines == ["step 1: ok", "\\x1b[2J\\x00\\xe9", f"step 2: error: ValueError {said} line 1"]


async def test_snippets_are_not_taken_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "steps.py"
    file.write_text("print(1)")
    done = await asyncio.to_thread(verify, file, "--snippets", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--snippets is for --self-test" in done.stderr


@pytest.mark.parametrize(("status", "returncode"), [("refused", 0), ("ok", 1)])
async def test_the_self_test_runs_a_given_file_and_fails_with_it(tmp_path: Path, status: str, returncode: int) -> None:
    file = tmp_path / "snippets.json"
    long = {"name": "euros", "code": f"# {'€' * 100_000}", "expect": {"status_in": [status]}}
    file.write_text(json.dumps([long, {"name": "plain", "code": "print(1)", "expect": {"status_in": ["ok"]}}]))
    done = await asyncio.to_thread(verify, file, "--self-test", "--snippets")
    assert done.returncode == returncode, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:3]]
    assert [line[:3] for line in lines] == [["FAIL" if returncode else "ok", "euros", "refused"], ["ok", "plain", "ok"]]
    assert returncode == 0 or "longer than 131072 bytes" in done.stdout


async def test_no_more_requests_than_the_queue_holds_are_under_way() -> None:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1, queue=3))
    try:
        await verifier.start()
        work = [asyncio.ensure_future(verifier.check(problem(), (), f"import math\nprint({i})")) for i in range(20)]
        most = 0
        while not all(request.done() for request in work):
            most = max(most, len(verifier._links[0].held))
            await asyncio.sleep(0)
        assert [request.result().stdout for request in work] == [f"{i}\n" for i in range(20)]
    finally:
        await verifier.close()
    assert most == 3
