"""The arithmetic lane gives what a process of its own gives, and takes on nothing else."""

import ast
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve.schema import VerifierConfig
from evolve.types import Problem, Status
from evolve.verify.arithmetic import is_arithmetic
from evolve.verify.service import SandboxVerifier
from evolve.verify.steps import looks_plain, prefix_keys

pytestmark = pytest.mark.asyncio(loop_scope="module")
_count = iter(range(10**9))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verifier() -> AsyncIterator[SandboxVerifier]:
    verifier = SandboxVerifier(VerifierConfig(supervisors=1))
    yield verifier
    await verifier.close()


PROGRAMS = [
    ("a = 3 + 4", "b = a * 2", "print(a, b, sep='-')"),
    ("total = 16 * 2\nprint(total)", "total -= 5", "print(total / 3)", "print(total // 0)"),
    ("x = 0.1 + 0.2", "print(round(x, 2), x)", "print(f'{x:.3f} {x!r}')"),
    ("a, b = 1, 2", "a, b = b, a", "print((a, b), divmod(17, 5))"),
    ("print(undefined)",),
    ("sum = 3", "print(sum((1, 2)))"),
    ("print(-2 ** 2, 7 % -3, True + 1, 'ab' * 3, 10 ** 20)",),
    ("a = (", "b = 1"),
    ("a = 1 if 2 > 1 else 0\nprint(a)", "print(int('12') + float('1.5'))", "int('x')"),
]


@pytest.mark.parametrize("program", PROGRAMS)
async def test_the_lane_gives_what_a_process_gives(verifier: SandboxVerifier, program: tuple[str, ...]) -> None:
    for lane_id, alone_id in [(f"lane{next(_count)}", f"alone{next(_count)}")]:
        for depth in range(1, len(program) + 1):
            codes = program[:depth]
            verdicts = [
                await verifier.execute(name, codes, "light", prefix_keys(name, codes), lane=lane)
                for name, lane in ((lane_id, True), (alone_id, False))
            ]
            seen = [(v.status, v.stdout, v.exception, v.message, v.line, v.truncated) for v in verdicts]
            assert seen[0] == seen[1]
            if not verdicts[0].ok:
                break


async def test_what_is_too_slow_or_too_large_for_the_lane_goes_the_ordinary_way(verifier: SandboxVerifier) -> None:
    before = await verifier.stats()
    p = Problem(f"p{next(_count)}", "", ())
    big = await verifier.check(p, (), "x = 7 ** 4000")
    after = await verifier.check(p, ("x = 7 ** 4000",), "print(x % 1000)")
    assert (big.status, after.stdout) == (Status.OK, f"{7**4000 % 1000}\n")
    assert (await verifier.stats())["lane_declined"] > before.get("lane_declined", 0)


async def test_a_step_beyond_the_lane_continues_from_states_of_the_lane(verifier: SandboxVerifier) -> None:
    p = Problem(f"p{next(_count)}", "", ())
    prefix = ("a = 3", "b = a + 1", "print(b)")
    for depth in range(3):
        await verifier.check(p, prefix[:depth], prefix[depth])
    verdict = await verifier.check(p, prefix, "items = [a, b]\nprint(items)")
    assert (verdict.status, verdict.stdout, verdict.replayed) == (Status.OK, "[3, 4]\n", False)
    later = await verifier.check(p, (*prefix, "items = [a, b]\nprint(items)"), "print(items[1])")
    assert later.stdout == "4\n"


@pytest.mark.parametrize(
    "code",
    [
        "a = []",
        "a.b = 1",
        "a = {}",
        "import os",
        "print.__self__",
        "a = print",
        "__import__('os')",
        "open('x')",
        "f'{a.b}'",
        "(lambda: 1)()",
        "a = [x for x in y]",
        "while True: pass",
        "def f(): pass",
        "exec('1')",
        "__builtins__",
        "print(1, file=x)",
        "a[0] = 1",
        "type('X', (), {})",
        "getattr(a, 'b')",
        "del a",
        "print(*a)",
        "(a := 3)",
        "b'x'",
        "...",
    ],
)
async def test_the_lanes_grammar_has_no_way_to_reach_anything(code: str) -> None:
    allowed = is_arithmetic(code)
    # A bare name may be read: without calls or attributes nothing can be done with it.
    assert not allowed or code == "a = print"


@given(st.text(alphabet="abx0159+-*/%()=.,'\" \n<>_[]{}:", max_size=40))
@settings(max_examples=300, deadline=None)
async def test_what_the_lane_takes_has_no_attributes_subscripts_or_foreign_calls(code: str) -> None:
    if is_arithmetic(code):
        for node in ast.walk(ast.parse(code)):
            assert not isinstance(node, ast.Attribute | ast.Subscript | ast.List | ast.Dict | ast.Set | ast.Lambda)


async def test_comments_do_not_keep_a_step_from_the_lane() -> None:
    assert looks_plain("# Step 1: for each of the 3 boxes, if any, add.\na = 3 * 2")
    assert not looks_plain("for i in x: pass")
