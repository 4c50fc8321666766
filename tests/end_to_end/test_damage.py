"""Accidents between two runs of the same command: a clear error or a repair, never a wrong result.

A small round with scripted engines; search, sandboxes, training and evaluation are real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.outcome import damage, outcome
from benchmarks.chaos.recipe import SCRIPTED_ROUND
from evolve.store.run import RunDirectory

ROOT = Path(__file__).parents[2]
RECIPE = (*SCRIPTED_ROUND, "cluster.shards=1", "sft.workers=1", "ppm.workers=1")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
PRIVATE_MOUNTS = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--mount")


def command(runs: Path) -> list[str]:
    drive = (sys.executable, "-m", "benchmarks.chaos", "--drive", "benchmarks.scripted:engines", *RECIPE)
    return [*drive, f"run.dir={runs}"]


def drive(runs: Path) -> tuple[int, str]:
    """Exit status and output of the command."""
    done = subprocess.run(
        command(runs), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr[-6000:]
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs directory of a finished run."""
    runs = tmp_path_factory.mktemp("finished")
    status, output = drive(runs)
    assert status == 0, output
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def result(runs: Path) -> dict[str, Any]:
    return outcome(runs / "smoke")


def test_damaged_manifests_and_checkpoints_are_refused_and_what_is_advised_mends_them(
    finished: Path, runs: Path
) -> None:
    directory = RunDirectory(runs / "smoke").round(1)
    checkpoint = directory.sft / "checkpoint"
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    manifest = directory.path / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: entry for name, entry in whole.items() if name != "evaluation"}))
    status, output = drive(runs)
    assert status == 1
    assert re.search(rf"delete it and {manifest}, and run with round=1", " ".join(output.split()))
    shutil.rmtree(checkpoint)
    shutil.rmtree(directory.ppm / "checkpoint")

    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    status, output = drive(runs)
    assert status == 1
    assert f"{manifest} is not readable" in output
    assert "Delete it and run the same command" in output
    manifest.unlink()

    part = next(directory.trees.glob("part-*"))
    part.write_bytes(part.read_bytes()[:1000])
    status, output = drive(runs)
    assert status == 0, output
    assert f"set aside as damaged-{part.name} and its trees are grown again" in output
    assert result(runs) == result(finished)
    assert damage(runs / "smoke") == []


def test_a_disk_that_is_full_or_read_only_is_named_and_the_same_command_goes_on_later(
    finished: Path, runs: Path, tmp_path: Path
) -> None:
    directory = RunDirectory(runs / "smoke").round(1)
    for stage in ("sft", "ppm"):
        shutil.rmtree(directory.path / stage / "checkpoint")
        directory.forget(stage)
    directory.forget("evaluation")
    used = sum(path.stat().st_blocks * 512 for path in runs.rglob("*"))
    small = tmp_path / "small"
    small.mkdir()
    run = " ".join(command(small))
    script = f"""
        set -e
        mount -t tmpfs -o size={used + 3 * 2**20} tmpfs {small} || exit 77
        cp -r {runs}/. {small}
        status=0; {run} > {tmp_path}/full.txt 2>&1 || status=$?; echo "full $status"
        mount -o remount,ro {small}
        status=0; {run} > {tmp_path}/read-only.txt 2>&1 || status=$?; echo "read-only $status"
        mount -o remount,rw,size={used + 60 * 2**20} {small}
        status=0; {run} > {tmp_path}/mended.txt 2>&1 || status=$?; echo "mended $status"
        cp -r {small} {tmp_path}/after
    """
    done = subprocess.run(
        [*PRIVATE_MOUNTS, "sh", "-c", script],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(f"this machine does not let its users mount anything: {done.stderr}")
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in ("full", "read-only", "mended")}
    assert done.stdout.splitlines() == ["full 1", "read-only 1", "mended 0"], (done.stderr, said)
    assert re.search(r"error: cannot write .*: No space left on device\. Free space there", said["full"])
    assert "To go on: " in said["full"]
    assert re.search(r"error: cannot write .*: Read-only file system\. Make it writable", said["read-only"])
    assert "Traceback" not in "".join(said.values())
    assert result(tmp_path / "after") == result(finished)
    assert damage(tmp_path / "after" / "smoke") == []
