# ruff: noqa: ASYNC221, ASYNC240
"""The hostile snippets get nowhere, and do with a layer removed."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from evolve.schema import VerifierConfig
from evolve.types import Status
from evolve.verify import cgroups, selftest
from evolve.verify.layers import detect, without
from evolve.verify.selftest import SelfTest, load
from evolve.verify.service import SandboxVerifier
from tests.verify.support import problem

pytestmark = pytest.mark.asyncio(loop_scope="module")
REPOSITORY = Path(__file__).parents[2]


HOSTILE = Path(__file__).parent / "hostile.json"


async def test_hostile_snippets_get_nowhere_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    failed = await selftest.self_test(load(HOSTILE), 1)
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("seccomp", {"new_namespaces", "udp_and_unix_sockets", "rare_calls"}),
        ("limits", {"few_descriptors"}),
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
    if layers.cgroup is None:
        pytest.skip("no memory control group can be made here")
    parent = Path(layers.cgroup)
    verifier = SandboxVerifier(
        VerifierConfig(supervisors=1, memory_mb=256, snapshot_mb=16, cpu_s=20, wall_s=200), layers
    )
    try:
        p = problem()
        await verifier.check(p, (), "a = [7]")
        hog = await verifier.check(p, ("a = [7]",), "x = []\nwhile True:\n    x.append(b'a' * 10**7)")
        after = await verifier.check(p, ("a = [7]",), "print(a)")
        own = {
            path
            for path in parent.glob("evolve-sandbox-*")
            for pid in selftest.descendants()
            if f"-{pid}-" in path.name
        }
    finally:
        await verifier.close()
    assert (hog.status, "memory" in hog.message) == (Status.OOM, True)
    assert after.stdout == "[7]\n"
    cgroups.clear(parent, 30.0)  # The kernel may take its time over the dead on a busy machine.
    assert own
    assert not [path for path in own if path.exists()]


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


async def test_hostile_snippets_get_nowhere_32_at_a_time_as_an_ordinary_user(tmp_path: Path) -> None:
    base = str(Path(sys.base_prefix).resolve())
    if os.geteuid() != 0:
        prefix = []
    elif Path("/root") not in Path(base).parents:
        prefix = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "env", "HOME=/"]
    else:
        prefix = ["unshare", "-m", "sh", "-c", AS_USER, "sh", str(tmp_path), base, str(REPOSITORY)]
    command = [*prefix, sys.executable, "-m", "evolve.verify", "--self-test", "--concurrency", "32"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this container does not let root mount")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "uid" not in done.stdout.splitlines()[0]
