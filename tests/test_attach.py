"""Joining a cluster that is not there, or wants a token: an error at once that says why and what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from evolve.attach import UnreachableError, join

ROOT = Path(__file__).parent.parent


def test_a_run_whose_cluster_does_not_answer_ends_at_once_with_what_to_do_and_its_lock_given_back(
    tmp_path: Path,
) -> None:
    """`ray.init` by itself tries for minutes, and ends with a traceback."""
    command = ["conf=smoke", "cluster.address=127.0.0.1:1", f"run.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "evolve.driver", *command],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray cluster answers at 127.0.0.1:1 (")
    assert "refused" in done.stderr
    assert "leave the address out" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("**/lock.json"))


def test_what_answers_is_asked_once_before_ray_joins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with a token, and a port that is no Ray's: `ray.init` would try both twenty times."""

    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("the token is missing or incorrect")

    def joined(**_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(ray._raylet, "GcsClient", refuse)
    monkeypatch.setattr(ray, "init", joined)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=r"missing or incorrect.*set RAY_AUTH_MODE=token"):
            join(address)
