"""A run in an object store, by the command that users type, with nothing else that lasts.

Engines are scripted; search, sandbox, extraction and training are real. Between two drivers everything that nodes keep
on their own disks is deleted.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evolve.remote import RemotePath
from evolve.store.lease import Lease
from evolve.store.run import RunDirectory
from tests.object_store.use import environment, objects_at

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from benchmarks.scripted import engines
from evolve import driver, stages

open_run = stages.open_run
stages.open_run = lambda config: open_run(config, engines(config))
if __name__ == "__main__":
    sys.exit(driver.main(sys.argv[1:]))
"""
RECIPE = (
    "conf=smoke", "rounds=[{generator: bootstrap, value: terminal}]", "problems.per_round=40", "problems.test_size=12",
    "toy.pretrain_steps=2", "toy.demonstrations=60", "toy.quoting_texts=60", "toy.workers=1", "sft.replay=20",
    "sft.checkpoint_steps=2", "evaluate.search_problems=6", "evaluate.samples=2", "verifier.supervisors=1",
    "cluster.restarts=20", "cluster.placement_timeout_s=600",
)  # fmt: skip


class Scene:
    """The command, the store, and what a node keeps."""

    def __init__(self, directory: Path, store: RemotePath) -> None:
        self.cache, self.order, self.script = directory / "cache", directory / "kill", directory / "command.py"
        self.script.write_text(COMMAND)
        self.store = store
        self.run = RunDirectory.of(str(store), "smoke")

    def drive(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(self.script), *RECIPE, f"run.dir={self.store}"],
            cwd=ROOT,
            env=environment(EVOLVE_CACHE=str(self.cache), OBJECTS_KILL=str(self.order)),
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip

    def objects(self) -> dict[str, int]:
        """When each object of the rounds was put."""
        root = Path(self.run.path.uri.removeprefix("objects://"))
        return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.glob("round-*/**/*.*")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        yield Scene(directory, objects_at(directory / "bucket", patch))


def test_a_driver_killed_before_it_named_its_trees_finds_them_again_without_its_disk(scene: Scene) -> None:
    scene.order.write_text("*/round-1/manifest.json")
    killed = scene.drive()
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-2000:] + killed.stderr[-4000:]
    assert scene.run.round(1).manifest() == {}
    parts = {name: put for name, put in scene.objects().items() if "/trees/" in name}
    assert parts
    shutil.rmtree(scene.cache)

    # And now a trainer dies after it put a checkpoint's files and before they count.
    scene.order.write_text("*/round-1/sft/checkpoint/published.json")
    done = scene.drive()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert not scene.order.exists()
    assert {name: put for name, put in scene.objects().items() if "/trees/" in name} == parts
    manifest = scene.run.round(1).manifest()
    assert set(manifest) == {"search", "rows", "sft", "ppm", "evaluation"}
    assert set(manifest["search"]["parts"]) == {Path(name).name for name in parts}
    assert manifest["sft"]["metrics"]["resumed_from"] > 0
    report = json.loads((scene.run.path / "report.json").read_text())
    assert [entry["round"] for entry in report["rounds"]] == [0, 1]
    assert {json.loads(line)["round"] for line in scene.run.metrics.read_text().splitlines()} == {0, 1}
    offline = [path.name for path in (scene.run.path / "wandb").glob("offline-run-*")]
    assert {name.rpartition("-")[2] for name in offline} == {"0", "1"}


def test_a_second_driver_is_refused_and_a_finished_run_is_left_alone(scene: Scene) -> None:
    before = scene.objects()
    shutil.rmtree(scene.cache)
    held = Lease(scene.run.path, lambda reason: None)
    held.acquire()
    try:
        refused = scene.drive()
    finally:
        held.release()
    assert refused.returncode == 1
    assert f"{scene.run.path} is in use by another driver: host" in refused.stderr
    assert f"process {os.getpid()}" in refused.stderr
    again = scene.drive()
    assert again.returncode == 0, again.stderr[-3000:]
    assert scene.objects() == before
    assert str(scene.run.path) in again.stdout.replace("\n", "")
