"""The run directory: nothing half-written is believed, and one driver works at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evolve.store.files import publish_directory, publish_file, publish_json
from evolve.store.run import Lock, RunDirectory, RunError


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    publish_json(path, {"a": 1})

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    def fill(fail: bool) -> None:
        with publish_directory(target) as aside:
            (aside / "weights").write_bytes(b"whole")
            if fail:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fill(True)
    assert list(tmp_path.iterdir()) == []
    fill(False)
    assert (target / "weights").read_bytes() == b"whole"


def test_an_artefact_is_finished_once_the_manifest_names_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path).round(2)
    assert directory.finished("sft") is None
    directory.record("sft", digest="d", rows=3)
    directory.record("ppm", digest="e")
    assert directory.finished("sft") == {"digest": "d", "rows": 3}
    assert set(directory.manifest()) == {"sft", "ppm"}


def test_a_broken_manifest_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path).round(1)
    directory.record("sft", digest="d")
    (directory.path / "manifest.json").write_text('{"sft": {"dig')
    with pytest.raises(RunError, match=r"manifest\.json is not readable"):
        directory.manifest()


def test_a_second_driver_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    first = Lock(run)
    first.acquire()
    with pytest.raises(RunError, match=r"in use by another driver: host .*, process"):
        Lock(run).acquire()
    first.release()
    second = Lock(run)
    second.acquire()
    second.release()


def test_the_lock_of_a_killed_driver_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from evolve.store.run import Lock, RunDirectory;"
        "Lock(RunDirectory(Path(sys.argv[1]))).acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "lock.json").exists()
    lock = Lock(RunDirectory(tmp_path))
    lock.acquire()
    lock.release()


def test_the_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "noon"}))
    with pytest.raises(RunError, match="host elsewhere, process 1, since noon"):
        Lock(RunDirectory(tmp_path)).acquire()
