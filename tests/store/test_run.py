"""The run directory: nothing half-written is believed, and what a disk refuses is said."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve.files import (
    StorageError,
    aside_of,
    publish_directory,
    publish_file,
    publish_json,
    publish_rows,
    remove_asides,
    storage_errors,
)
from evolve.store.lock import Lock
from evolve.store.run import RunDirectory, RunError


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


@pytest.mark.parametrize("rows", [[], [{"a": 1}], [{"a": 1, "b": [None, "é"]}, {"a": 2}]])
def test_rows_are_published_as_a_list_one_a_line(tmp_path: Path, rows: list) -> None:
    publish_rows(tmp_path / "rows.json", iter(rows))
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert len((tmp_path / "rows.json").read_text().splitlines()) == (len(rows) + 2 if rows else 1)


def test_a_directory_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    aside = aside_of(target)
    (aside / "deep").mkdir(parents=True)
    (aside / "deep" / "weights").write_bytes(b"whole")
    publish_directory(aside, target)
    assert (target / "deep" / "weights").read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]
    aside.mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish_directory(aside, target)
    assert (target / "deep" / "weights").read_bytes() == b"whole"


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("manifest.json", ".netrc", ".part-a.parquet", "part.0123abcd")]
    for path in kept:
        path.touch()
    aside_of(tmp_path / "manifest.json").touch()
    (aside_of(tmp_path / "checkpoint") / "deep").mkdir(parents=True)
    remove_asides(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    publish_json(path, {"a": 1})

    def fill(aside: Path) -> None:
        aside.touch()
        with Path("/dev/full").open("w") as full:  # every write to it fails as on a full disk
            full.write("half")

    with pytest.raises(StorageError, match=r"a\.json: No space left on device\. Free space there \(.* GiB are free\)"):
        publish_file(path, fill)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_run_directory_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match=r"manifest\.json: Read-only file system\. Make it writable"):
        RunDirectory(tmp_path).round(1).record("sft", digest="d")
    with pytest.raises(StorageError, match=r"lock\.json: Read-only file system"):
        Lock(RunDirectory(tmp_path)).acquire()
    assert list(tmp_path.iterdir()) == [tmp_path / "round-1"]


@pytest.mark.parametrize(("free", "raised"), [(0, StorageError), (2**30, RuntimeError)])
def test_an_error_of_a_librarys_own_means_a_full_disk_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, raised: type[Exception]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    said = "No space left on device" if raised is StorageError else "PytorchStreamWriter"
    with pytest.raises(raised, match=said), storage_errors(tmp_path / "checkpoint"):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_a_file_elsewhere_that_may_not_be_read_is_not_blamed_on_the_run_directory(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="problems"), storage_errors(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/problems.parquet")


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
    with pytest.raises(RunError, match=r"manifest\.json is not readable .* Delete it and run the same"):
        directory.manifest()
