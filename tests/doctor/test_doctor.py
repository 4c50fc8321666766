"""`python -m evolve.doctor` as it is run: on this machine, on a Ray cluster, and where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from evolve.attach import LiveNode, attached
from evolve.doctor import nodes
from evolve.doctor.__main__ import main
from evolve.doctor.checks import Status
from tests.object_store.use import objects_at

ROOT = Path(__file__).parents[2]
NODE_CHECKS = {"memory", "/dev/shm", "disk", "GPU", "sandbox"}


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "EVOLVE_RUNS")}
    return subprocess.run(
        [sys.executable, "-m", "evolve.doctor", *arguments],
        cwd=ROOT,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_this_machine_is_examined_and_left_as_it_was(tmp_path):
    done = doctor("conf=smoke", f"run.dir={tmp_path / 'runs'}", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    by_name = {check["name"]: check for check in found["checks"]}
    assert {*NODE_CHECKS, "versions", "ports", "run directory", "W&B", "placement"} <= set(by_name)
    assert by_name["sandbox"]["status"] in ("ok", "warn")
    assert found["ok"] == (done.returncode == 0), done.stdout + done.stderr
    assert all(check["status"] == "ok" or check["fix"] for check in found["checks"])
    assert "checks" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_does_not_answer_is_said_clearly(tmp_path):
    done = doctor("--json", str(tmp_path / "found.json"), RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in " ".join(done.stdout.split())
    assert "fix: see above" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["checks"][0]["name"] == "cluster"


def test_wrong_arguments_are_refused_with_their_place():
    done = doctor("serch.rollouts=3")
    assert done.returncode == 2
    assert "did you mean search.rollouts" in done.stderr


def test_every_node_of_a_running_cluster_is_examined(ray_cluster, tmp_path, capsys):
    address = ray.get_runtime_context().gcs_address
    arguments = ["conf=smoke", f"run.dir={tmp_path}", f"cluster.address={address}", "--nodes", "1"]
    status = main([*arguments, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    by_name = {check["name"]: check for check in found["checks"]}
    assert {*NODE_CHECKS, "nodes", "versions", "run directory", "ports", "W&B", "placement"} <= set(by_name)
    (name,) = {by_name[check]["where"] for check in NODE_CHECKS}
    assert by_name["run directory"] | {"where": name, "status": "ok"} == by_name["run directory"]
    assert by_name["ports"]["status"] == "ok"
    assert status == (0 if found["ok"] else 1), capsys.readouterr().out
    assert not list(tmp_path.glob("**/.doctor-*"))


def test_nodes_that_never_join_are_waited_for_no_longer_than_asked(ray_cluster):
    with attached("auto") as current:
        found = nodes.wait_for(2, current, timeout_s=0.2)
    assert len(found) == 1
    assert nodes.joined(found, 2, 0.2).status is Status.FAIL


def test_a_node_that_is_gone_is_lost_and_the_others_still_answer(ray_cluster):
    with attached("auto") as current:
        (alive,) = current()
    gone = LiveNode("0" * len(alive.id), "gone", "192.0.2.1", 1, 0)
    probes = nodes.Probes([alive, gone], timeout_s=5)
    try:
        answers = probes.ask("dial", lambda node: ("127.0.0.1", 1))
    finally:
        probes.close()
    assert list(answers) == [alive.id]
    assert "refused" in answers[alive.id]
    assert [(check.where, check.status) for check in probes.lost] == [("gone", Status.FAIL)]


def test_an_object_store_is_tried_out_and_a_silent_one_needs_credentials(tmp_path, monkeypatch):
    run = objects_at(tmp_path / "bucket", monkeypatch) / "x"
    (check,) = nodes.same_directory(None, run)
    assert (check.status, check.what) == (Status.OK, str(run))
    assert not run.exists()
    monkeypatch.setenv("OBJECTS_FAIL", "*")
    (check,) = nodes.same_directory(None, run)
    assert check.status is Status.FAIL
    assert "the store takes nothing" in check.what
    assert "credentials" in check.fix


@pytest.mark.parametrize("writable", [True, False])
def test_the_run_directory_is_tried_out_without_a_cluster_too(tmp_path, writable):
    directory = tmp_path / "runs"
    if not writable:
        directory.write_text("")
    (check,) = nodes.same_directory(None, directory / "x")
    assert (check.status is Status.OK) == writable
