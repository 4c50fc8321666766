"""Records of an evaluation under way: kept one by one, and never mistaken for those of another evaluation."""

import errno
from pathlib import Path

import pytest

from evolve.files import StorageError
from evolve.store.records import RecordFile

ROWS = [{"problem_id": f"p{number}", "greedy_tokens": number} for number in range(3)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with three records, as a killed process has left it."""
    path = tmp_path / "eval" / "records.partial.jsonl"
    kept = RecordFile(path, "this")
    assert kept.open() == {}
    kept.append(ROWS[:2])
    kept.append(ROWS[2:])
    return path


def test_records_are_there_for_whoever_continues(file: Path) -> None:
    kept = RecordFile(file, "this")
    assert list(kept.open().values()) == ROWS
    kept.append([{"problem_id": "p3"}])
    assert set(RecordFile(file, "this").open()) == {"p0", "p1", "p2", "p3"}
    kept.remove()
    assert RecordFile(file, "this").open() == {}


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_record_that_was_not_written_to_the_end_is_dropped_and_others_follow_it(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[:-cut])
    kept = RecordFile(file, "this")
    whole = ROWS[:3] if cut == 1 else ROWS[:2]
    assert list(kept.open().values()) == whole
    kept.append([{"problem_id": "p9"}])
    assert [row["problem_id"] for row in RecordFile(file, "this").open().values()][-1] == "p9"


def test_records_that_come_from_something_else_are_not_taken(file: Path) -> None:
    assert RecordFile(file, "another policy").open() == {}
    assert RecordFile(file, "this").open() == {}, "they are dropped for good"


def test_a_full_disk_is_an_error_that_says_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = RecordFile(file, "this")
    kept.open()
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="Free space there"):
        kept.append([{"problem_id": "p3"}])
