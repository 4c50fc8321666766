"""A limit of the sandbox that makes no sense is refused when the configuration is read, with its key."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from evolve.config import ConfigError, load
from evolve.schema import VerifierConfig
from evolve.verify.service import SandboxVerifier

SENSELESS = [
    *(("supervisors", 0), ("supervisors", -1), ("supervisors", 5000)),
    *(("cpu_s", 0), ("cpu_s", -1.5), ("cpu_s", 1e9), ("wall_s", 1.0), ("wall_s", 1e9)),
    *(("memory_mb", 1), ("memory_mb", 10**9), ("output_bytes", 0), ("output_bytes", 10**7)),
    *(("snapshot_mb", 0), ("snapshot_mb", 10**9), ("grade_timeout_s", 0), ("grade_timeout_s", -1)),
    *(("queue", 0), ("queue", 10**9), ("max_infrastructure_failures", 2), ("max_infrastructure_failures", -0.1)),
]


@pytest.mark.parametrize(("key", "value"), SENSELESS)
def test_a_senseless_limit_is_refused_by_name_and_place(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        load([f"verifier.{key}={value}"])
    assert f"verifier.{key}" in str(caught.value)
    assert "it must be" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), SENSELESS)
def test_a_verifier_used_alone_refuses_it_too(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"verifier\.{key}"):
        SandboxVerifier(dataclasses.replace(VerifierConfig(), **{key: value}))


def test_every_limit_has_values_that_are_refused() -> None:
    assert {key for key, _ in SENSELESS} == {field.name for field in dataclasses.fields(VerifierConfig)}


@pytest.mark.parametrize("value", ["nan", "inf", "null", "many"])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"verifier\.cpu_s"):
        load([f"verifier.cpu_s={value}"])


def test_a_senseless_limit_is_refused_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom evolve.config import ConfigError, load\n"
        "try:\n    load(['verifier.cpu_s=0'])\n"
        "except ConfigError as error:\n    print('refused' if 'verifier.cpu_s' in str(error) else error)\n"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'sympy', 'numpy', 'math_verify'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines() == ["refused", "[]"]
