"""Part files after an accident: damaged ones are set aside, a tree that is there twice is kept once."""

from pathlib import Path

import pytest

from evolve.files import file_digest
from evolve.store.parts import PATTERN, damaged_parts, mend_parts, mended_parts
from evolve.store.trees import read_part, to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind


def tree(problem: str, number: int = 0) -> Tree:
    made = Tree(problem, 1, number, 9, (5, 6))
    made.add(0, NodeKind.TERMINAL, "# b", "print(1)", (8,), (-0.25,), answer="1", correct=True)
    return made


def write(directory: Path, name: str, *problems: str) -> Path:
    write_part(directory, name, [to_batch(tree(problem)) for problem in problems])
    return directory / name


def keys(directory: Path) -> set[str]:
    return {key.problem_id for _, keys in mend_parts(directory, PATTERN, []) for key in keys}


def test_whole_parts_are_left_as_they_are(tmp_path: Path) -> None:
    files = [write(tmp_path, "part-a.parquet", "p0", "p1"), write(tmp_path, "part-b.parquet", "p2")]
    before = [file_digest(path) for path in files]
    parts = mended_parts(tmp_path)
    assert parts.trees == {"part-a.parquet": 2, "part-b.parquet": 1}
    assert (parts.count, parts.notes) == (3, ())
    assert [file_digest(path) for path in files] == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_part_is_set_aside_and_its_trees_count_as_not_grown(tmp_path: Path, share: float) -> None:
    write(tmp_path, "part-a.parquet", "p0")
    broken = write(tmp_path, "part-b.parquet", "p1", "p2")
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    parts = mended_parts(tmp_path)
    assert set(parts.trees) == {"part-a.parquet"}
    assert "part-b.parquet is damaged" in parts.notes[0]
    assert (tmp_path / "damaged-part-b.parquet").exists()
    assert mended_parts(tmp_path).notes == ()


def test_a_byte_that_flipped_in_a_part_is_noticed_when_the_part_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "part-a.parquet", *(f"p{number}" for number in range(50)))
    content = path.read_bytes()
    unnoticed = []
    for at in range(4, len(content) - 8, 61):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            if [to_batch(t) for t in read_part(path)] != [to_batch(tree(f"p{number}")) for number in range(50)]:
                unnoticed.append(at)
        except (OSError, ValueError, KeyError):
            continue
    assert unnoticed == []


def test_a_tree_in_two_parts_is_kept_once_and_the_others_of_its_part_stay(tmp_path: Path) -> None:
    write(tmp_path, "part-a.parquet", "p0", "p1")
    write(tmp_path, "part-b.parquet", "p1", "p2")
    write(tmp_path, "part-c.parquet", "p0", "p2")
    parts = mended_parts(tmp_path)
    assert parts.trees == {"part-a.parquet": 2, "part-b.parquet": 1}
    assert [t.problem_id for t in read_part(tmp_path / "part-b.parquet")] == ["p2"]
    assert not (tmp_path / "part-c.parquet").exists()
    assert len(parts.notes) == 2


def test_parts_that_changed_or_vanished_since_they_were_recorded_are_named(tmp_path: Path) -> None:
    names = [f"part-{letter}.parquet" for letter in "abc"]
    recorded = {name: file_digest(write(tmp_path, name, name)) for name in names}
    assert damaged_parts(tmp_path, recorded) == {}
    (tmp_path / "part-a.parquet").unlink()
    with (tmp_path / "part-b.parquet").open("r+b") as file:
        file.seek(20)
        file.write(b"x")
    assert damaged_parts(tmp_path, recorded) == {
        "part-a.parquet": "it is missing",
        "part-b.parquet": "its digest is not the one in the manifest",
    }
