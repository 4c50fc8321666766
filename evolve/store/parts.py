"""Part files as a killed run may have left them: which are whole, which hold a tree twice, and how that is mended.

A part that is not in the manifest yet may be damaged, or have been written by an actor whose driver was gone already.
Trees are the unit of work, so the mending is the same for all of it: what cannot be believed is set aside or left out,
and the trees that are missing then are grown again.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolve.files import Place, entries, file_digest, readable, rename
from evolve.store.trees import TreeKey, ending_of, publish_part
from evolve.tree import ROOT

PATTERN = "part-*.parquet"
DAMAGED = "damaged-"
"""What the name of a part begins with that was set aside."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The part files of a round."""

    trees: Mapping[str, int]
    """How many trees each holds, by its name; no tree occurs twice."""
    notes: tuple[str, ...]
    """What had to be mended."""
    others: tuple[str, ...] = ()
    """Ids of the problems, in order, that were not expected."""

    @property
    def count(self) -> int:
        """Trees in all parts together."""
        return sum(self.trees.values())


def mended_parts(directory: Place, wanted: Container[str] | None = None) -> Parts:
    """The part files in `directory`, once those that are not as written are set aside and second copies of trees
    dropped. `wanted`: ids of the problems whose trees are expected; None: any.

    For the one driver of the run, while nothing is being written there. Of a tree only a hash is held.
    """
    notes: list[str] = []
    trees: dict[str, int] = {}
    others: set[str] = set()
    for name, keys in mend_parts(directory, PATTERN, notes):
        trees[name] = len(keys)
        if wanted is not None:
            others.update(key.problem_id for key in keys if key.problem_id not in wanted)
    return Parts(trees, tuple(notes), tuple(sorted(others)))


def mend_parts(directory: Place, pattern: str, notes: list[str]) -> Iterator[tuple[str, tuple[TreeKey, ...]]]:
    """As `mended_parts` for the names that fit, one part after the other: its name and the trees it holds. Adds to
    `notes`."""
    known: set[int] = set()
    for path in entries(directory, pattern):
        try:
            keys = _keys(path)
        except (OSError, pa.ArrowException, ValueError) as error:
            notes.append(set_aside(path, str(error).splitlines()[0]))
            continue
        name, kept = path.name, []
        for number, key in enumerate(keys):
            if hash(key) not in known:
                known.add(hash(key))
                kept.append(number)
        if len(kept) < len(keys):
            notes.append(f"{path}: {len(keys) - len(kept)} of its {len(keys)} trees were there already; dropped")
            name = _keep_only(path, kept)
        if kept:
            yield name, tuple(keys[number] for number in kept)


def set_aside(path: Place, reason: str) -> str:
    """Rename a part that cannot be believed; returns a note about it."""
    rename(path, DAMAGED + path.name)
    return f"{path} is damaged ({reason}); it is set aside as {DAMAGED}{path.name} and its trees are grown again"


def damaged_parts(directory: Place, recorded: Mapping[str, str]) -> dict[str, str]:
    """Parts (name to digest, as the manifest has them) that are missing or changed, with what is wrong."""
    found: dict[str, str] = {}
    for name, digest in recorded.items():
        path = directory / name
        if not path.exists():
            found[name] = "it is missing"
        elif file_digest(path) != digest:
            found[name] = "its digest is not the one in the manifest"
    return found


def _keys(path: Place) -> tuple[TreeKey, ...]:
    """The trees of a part, in their order; raises ValueError when its content is not what was written."""
    content = path.read_bytes()
    if not path.name.endswith(ending_of(content)):
        raise ValueError("its content has not the digest that its name says")
    table = pq.read_table(pa.BufferReader(content), columns=["problem_id", "tree", "node"])
    roots = table.filter(pc.field("node") == ROOT)
    columns = (roots.column("problem_id").to_pylist(), roots.column("tree").to_pylist())
    return tuple(TreeKey(problem, number) for problem, number in zip(*columns, strict=True))


def _keep_only(path: Place, kept: Sequence[int]) -> str:
    """Write a part again with some of its trees, by their place in it; without any, only remove it. Returns the new
    part's name."""
    name = ""
    if kept:
        table = pq.read_table(readable(path), page_checksum_verification=True)
        places = itertools.accumulate(node == ROOT for node in table.column("node").to_pylist())
        wanted = {number + 1 for number in kept}
        table = table.filter(pa.array([place in wanted for place in places]))
        name = publish_part(path.parent, path.name.rpartition("-")[0], table)
    path.unlink()
    return name
