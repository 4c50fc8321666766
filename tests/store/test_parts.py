"""Part files after an accident: damaged ones are set aside, a tree that is there twice is kept once."""

import random
from pathlib import Path

import pytest

from evolve.files import file_digest
from evolve.store.parts import Parts, damaged_parts, mended_parts
from evolve.store.trees import read_part, to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind


def tree(problem: str, number: int = 0) -> Tree:
    made = Tree(problem, 1, number, 9, (5, 6))
    made.add(0, NodeKind.TERMINAL, "# b", "print(1)", (8,), (-0.25,), answer="1", correct=True)
    return made


def write(directory: Path, stem: str, *problems: str) -> Path:
    return directory / write_part(directory, stem, [to_batch(tree(problem)) for problem in problems]).name


def test_whole_parts_are_left_as_they_are(tmp_path: Path) -> None:
    files = [write(tmp_path, "part-a", "p0", "p1"), write(tmp_path, "part-b", "p2")]
    before = [file_digest(path) for path in files]
    parts = mended_parts(tmp_path)
    assert parts.trees == {files[0].name: 2, files[1].name: 1}
    assert (parts.count, parts.notes) == (3, ())
    assert [file_digest(path) for path in files] == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_part_is_set_aside_and_its_trees_count_as_not_grown(tmp_path: Path, share: float) -> None:
    whole, broken = write(tmp_path, "part-a", "p0"), write(tmp_path, "part-b", "p1", "p2")
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    parts = mended_parts(tmp_path)
    assert set(parts.trees) == {whole.name}
    assert f"{broken.name} is damaged" in parts.notes[0]
    assert (tmp_path / f"damaged-{broken.name}").exists()
    assert mended_parts(tmp_path).notes == ()


def test_whichever_bit_flips_in_a_part_its_trees_count_as_not_grown(tmp_path: Path) -> None:
    path = write(tmp_path, "part-a", *(f"p{number}" for number in range(20)))
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped, bit = bytearray(content), rng.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert mended_parts(tmp_path).trees == {}, bit
    path.write_bytes(content)
    assert mended_parts(tmp_path).trees == {path.name: 20}


def test_a_byte_that_flipped_in_a_part_is_noticed_when_the_part_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "part-a", *(f"p{number}" for number in range(50)))
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
    first = write(tmp_path, "part-a", "p0", "p1")
    write(tmp_path, "part-b", "p1", "p2")
    write(tmp_path, "part-c", "p0", "p2")
    parts = mended_parts(tmp_path)
    [second] = parts.trees.keys() - {first.name}
    assert parts.trees == {first.name: 2, second: 1}
    assert read_part(tmp_path / second) == [tree("p2")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second]
    assert len(parts.notes) == 2
    assert mended_parts(tmp_path) == Parts(parts.trees, ())


def test_a_tree_that_is_twice_in_one_part_is_kept_once(tmp_path: Path) -> None:
    write(tmp_path, "part-a", "p0", "p1", "p0", "p2")
    parts = mended_parts(tmp_path)
    assert list(parts.trees.values()) == [3]
    assert "1 of its 4 trees" in parts.notes[0]
    [path] = tmp_path.iterdir()
    assert read_part(path) == [tree("p0"), tree("p1"), tree("p2")]
    assert mended_parts(tmp_path) == Parts(parts.trees, ())


def test_parts_that_changed_or_vanished_since_they_were_recorded_are_named(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"part-{letter}", letter) for letter in "abc"]
    recorded = {path.name: file_digest(path) for path in paths}
    assert damaged_parts(tmp_path, recorded) == {}
    paths[0].unlink()
    with paths[1].open("r+b") as file:
        file.seek(20)
        file.write(b"x")
    assert damaged_parts(tmp_path, recorded) == {
        paths[0].name: "it is missing",
        paths[1].name: "its digest is not the one in the manifest",
    }


def test_problems_whose_trees_nobody_expects_are_named(tmp_path: Path) -> None:
    write(tmp_path, "part-a", "p0", "p2", "p3")
    assert mended_parts(tmp_path, {"p0", "p1"}).others == ("p2", "p3")
    assert mended_parts(tmp_path, {"p0", "p2", "p3"}).others == ()
