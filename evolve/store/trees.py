"""Trees as Arrow tables and Parquet part files: one row a node, readable without this project.

`SCHEMA` is the documented schema. A tree's own facts (problem, seed, digests, counters) stand on each of its rows, so
that any row can be understood alone; they are constant within a tree and compress to almost nothing. The root's
`token_ids` are the prompt. A part file holds whole trees only, and exists only complete: it is written aside, fsynced
and renamed. Its name carries a digest of its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve.files import Place, publish_file, readable
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind, Status

_TREE_FIELDS = [
    pa.field("problem_id", pa.string(), False, {"doc": "id of the problem"}),
    pa.field("round", pa.int32(), False, {"doc": "round that grew the tree, from 1"}),
    pa.field("tree", pa.int32(), False, {"doc": "number of the tree among the problem's, from 0"}),
    pa.field("seed", pa.int64(), False, {"doc": "seed every random choice of the tree derives from"}),
    pa.field("policy_digest", pa.string(), False, {"doc": "digest of the policy's checkpoint"}),
    pa.field("ppm_digest", pa.string(), False, {"doc": "digest of the PPM's checkpoint; empty without"}),
    pa.field("rollouts", pa.int32(), False, {"doc": "rollouts that were backed up"}),
    pa.field("sampled_tokens", pa.int64(), False, {"doc": "tokens generated, duplicates included"}),
    pa.field("scored_tokens", pa.int64(), False, {"doc": "tokens the PPM was asked to score"}),
    pa.field("infrastructure_failures", pa.int32(), False, {"doc": "failures of the sandbox or the grader"}),
    pa.field("prior_weight", pa.int32(), False, {"doc": "visits that `prior` counts as"}),
    pa.field("note", pa.string(), False, {"doc": "what was lost first, or why the search ended early"}),
]
_NODE_FIELDS = [
    pa.field("node", pa.int32(), False, {"doc": "id of the node within its tree; 0 is the root"}),
    pa.field("parent", pa.int32(), False, {"doc": "id of the parent; -1 for the root"}),
    pa.field("depth", pa.int32(), False, {"doc": "steps from the root"}),
    pa.field("kind", pa.string(), False, {"doc": "root, step, terminal, dead, or lost: to the sandbox or the grader"}),
    pa.field("text", pa.string(), False, {"doc": "the step as sampled, boundary included"}),
    pa.field("code", pa.string(), False, {"doc": "the step's executable part"}),
    pa.field("token_ids", pa.list_(pa.int32()), False, {"doc": "ids as sampled; the prompt's for the root"}),
    pa.field("logprobs", pa.list_(pa.float32()), False, {"doc": "natural log-probability of each id"}),
    pa.field("inserted_ids", pa.list_(pa.int32()), False, {"doc": "ids the environment put after the step"}),
    pa.field("copies", pa.int32(), False, {"doc": "samples of the expansion with this very text"}),
    pa.field("status", pa.string(), False, {"doc": "verdict of the execution"}),
    pa.field("stdout", pa.string(), False, {"doc": "what the step printed"}),
    pa.field("answer", pa.string(), True, {"doc": "the answer, of a terminal or a lost one"}),
    pa.field("correct", pa.bool_(), True, {"doc": "whether the answer is correct, of a terminal"}),
    pa.field("visits", pa.int32(), False, {"doc": "N: rollouts that passed through"}),
    pa.field("value_sum", pa.float64(), False, {"doc": "W: sum of their values, each in [-1, 1]"}),
    pa.field("q", pa.float64(), False, {"doc": "Q-value: mean value, `prior` included by its weight"}),
    pa.field("prior", pa.float64(), False, {"doc": "initial value: the PPM's score, else 0"}),
    pa.field("expanded_at", pa.int32(), False, {"doc": "rollouts done when candidates were sampled; -1: never"}),
    pa.field("ends", pa.list_(pa.int32()), False, {"doc": "numbers, from 0, of the rollouts that ended here"}),
    pa.field("end_values", pa.list_(pa.float64()), False, {"doc": "value in [-1, 1] that each of them brought"}),
    pa.field("code_ended", pa.bool_(), False, {"doc": "whether the code up to here is complete"}),
]
SCHEMA = pa.schema(_TREE_FIELDS + _NODE_FIELDS, {"format": "evolve.tree.2"})

_TREE_ATTRIBUTES = {"tree": "number"}
_SAME_NAME = [
    "parent", "depth", "text", "code", "logprobs", "inserted_ids", "copies", "stdout", "answer", "correct",
    "visits", "value_sum", "prior", "expanded_at", "code_ended",
]  # fmt: skip
"""Node columns that are the tree's lists of the same name."""


@dataclass(frozen=True, slots=True)
class TreeKey:
    """What identifies a tree within a round."""

    problem_id: str
    number: int


def to_table(trees: Iterable[Tree]) -> pa.Table:
    """Arrow table of whole trees, nodes in order of their ids."""
    return pa.Table.from_batches([to_batch(tree) for tree in trees], SCHEMA)


def to_batch(tree: Tree) -> pa.RecordBatch:
    """Arrow record batch of one tree."""
    size = len(tree)
    columns: dict[str, Any] = {
        f.name: [getattr(tree, _TREE_ATTRIBUTES.get(f.name, f.name))] * size for f in _TREE_FIELDS
    }
    columns |= {name: getattr(tree, name) for name in _SAME_NAME}
    columns["node"] = list(range(size))
    columns["kind"] = [kind.value for kind in tree.kind]
    columns["status"] = [status.value for status in tree.status]
    columns["token_ids"] = [tree.prompt_ids, *tree.token_ids[1:]]
    columns["q"] = [tree.q(node) for node in range(size)]
    columns["ends"], columns["end_values"] = _ends_by_node(tree)
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _ends_by_node(tree: Tree) -> tuple[list[list[int]], list[list[float]]]:
    """For each node the numbers of the rollouts that ended there, and what they brought."""
    numbers: list[list[int]] = [[] for _ in range(len(tree))]
    values: list[list[float]] = [[] for _ in range(len(tree))]
    for number, (node, value) in enumerate(tree.ends):
        numbers[node].append(number)
        values[node].append(value)
    return numbers, values


def from_table(table: pa.Table) -> list[Tree]:
    """The trees of a table written by `to_table`; raises ValueError when a tree's rows are incomplete."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    starts = [row for row, node in enumerate(columns["node"]) if node == ROOT]
    return [
        _tree_from_rows(columns, start, end) for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True)
    ]


def _tree_from_rows(columns: dict[str, list[Any]], start: int, end: int) -> Tree:
    if columns["node"][start:end] != list(range(end - start)):
        raise ValueError(f"rows {start} to {end} of problem {columns['problem_id'][start]} are not one whole tree")
    fields: dict[str, Any] = {_TREE_ATTRIBUTES.get(f.name, f.name): columns[f.name][start] for f in _TREE_FIELDS}
    rows: dict[str, Any] = {name: columns[name][start:end] for name in _SAME_NAME}
    for name in ("logprobs", "inserted_ids"):
        rows[name] = [tuple(value) for value in rows[name]]
    token_ids = [tuple(ids) for ids in columns["token_ids"][start:end]]
    ends = [
        (number, (node, value))
        for node, row in enumerate(range(start, end))
        for number, value in zip(columns["ends"][row], columns["end_values"][row], strict=True)
    ]
    children: list[list[int]] = [[] for _ in range(end - start)]
    for node, parent in enumerate(rows["parent"]):
        if parent >= 0:
            children[parent].append(node)
    return Tree(
        **fields,
        prompt_ids=token_ids[ROOT],
        children=children,
        kind=[NodeKind(kind) for kind in columns["kind"][start:end]],
        status=[Status(status) for status in columns["status"][start:end]],
        token_ids=[(), *token_ids[1:]],
        ends=[end for _, end in sorted(ends)],
        **rows,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """A durable part file and the trees in it."""

    name: str
    keys: tuple[TreeKey, ...]


def write_part(directory: Place, stem: str, trees: Sequence[pa.RecordBatch]) -> Part:
    """Make trees (each a batch of `to_batch`) durable as `directory/stem-DIGEST.parquet`; the file appears whole or not
    at all."""
    name = publish_part(directory, stem, pa.Table.from_batches(trees, SCHEMA))
    keys = tuple(TreeKey(batch["problem_id"][0].as_py(), batch["tree"][0].as_py()) for batch in trees)
    return Part(name, keys)


def publish_part(directory: Place, stem: str, table: pa.Table) -> str:
    """Write a table of whole trees as a part file; returns its name, which ends as `ending_of` says."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    content = sink.getvalue()
    name = f"{stem}{ending_of(content)}"
    publish_file(directory / name, lambda aside: aside.write_bytes(content))
    return name


def ending_of(content: bytes | pa.Buffer) -> str:
    """How the name of a part with this content ends: until a manifest names the part, that is what tells of damage."""
    return f"-{hashlib.sha256(content).hexdigest()[:16]}.parquet"


def read_part(path: Place) -> list[Tree]:
    """The trees of one part file.

    Raises:
        ValueError: the file was written by a version with another schema.
    """
    source = readable(path)
    found = pq.read_schema(source)
    if not found.equals(SCHEMA):
        theirs, ours = ((schema.metadata or {}).get(b"format", b"?").decode() for schema in (found, SCHEMA))
        raise ValueError(f"{path} holds trees as {theirs}, this version reads {ours}; grow them again in a new run")
    return from_table(pq.read_table(source, page_checksum_verification=True))
