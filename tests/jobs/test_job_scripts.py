"""The ready definitions for `ray job submit`: what they would submit, and how they refuse wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from evolve.config import load

ROOT = Path(__file__).parents[2]


def submitted(tmp_path: Path, script: str, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit status, the arguments `ray` was called with, and what was said on stderr."""
    ray = tmp_path / "ray"
    ray.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$@"\n')
    ray.chmod(0o755)
    done = subprocess.run(
        [ROOT / "jobs" / script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_one_round_is_the_documented_command(tmp_path):
    _, called, _ = submitted(tmp_path, "round.sh", "3", "conf=rstar_math", "run.dir=/shared/my runs")
    assert called[0] == str(ROOT)
    assert called[1:5] == ["job", "submit", "--working-dir", "."]
    assert json.loads(called[called.index("--runtime-env-json") + 1]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    }
    entrypoint = called[called.index("--") + 1 :]
    assert entrypoint[:3] == ["python", "-m", "evolve.driver"]
    config = load(entrypoint[3:])
    assert (config.round, config.run.dir, config.run.name) == (3, "/shared/my runs", "rstar-math-7b")


def test_all_rounds_leave_the_round_open(tmp_path):
    _, called, _ = submitted(tmp_path, "round.sh", "all", "conf=smoke")
    assert load(called[called.index("evolve.driver") + 1 :]).round is None


def test_an_evaluation_names_the_run_and_the_round(tmp_path):
    _, called, _ = submitted(tmp_path, "evaluate.sh", "/shared/runs/x", "4", "evaluate.samples=64")
    expected = ["python", "-m", "benchmarks.evaluation", "/shared/runs/x", "--round", "4", "evaluate.samples=64"]
    assert called[called.index("--") + 1 :] == expected


def test_a_benchmark_gets_a_core_and_the_gpus_asked_for(tmp_path):
    _, called, _ = submitted(tmp_path, "benchmark.sh", "verifier", "--check", GPUS="1")
    assert called[called.index("--") + 1 :] == ["python", "-m", "benchmarks.verifier", "--check"]
    assert called[called.index("--entrypoint-num-gpus") + 1] == "1"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("round.sh", []), ("evaluate.sh", ["/shared/runs/x"]), ("benchmark.sh", ["nothing"]), ("benchmark.sh", [])],
)
def test_wrong_arguments_are_refused_with_the_usage(tmp_path, script, arguments):
    status, called, said = submitted(tmp_path, script, *arguments)
    assert (status, called) == (2, [])
    assert f"usage: jobs/{script}" in said
