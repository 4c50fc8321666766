"""Training rows on disk: one Parquet (or Arrow IPC) row a `Trajectory` or `StepPair`.

Columns are the fields of the dataclass, by the same names, in the same order:

| type | columns |
|---|---|
| Trajectory | problem_id, text, answer: string · round, tree, node: int32 · correct: bool · q, logprob: float64 · prompt_ids, token_ids: list of int32 · sampled: list of bool |
| StepPair | problem_id, kind: string · round, tree, node: int32 · prefix_ids, positive_ids, negative_ids: list of int32 · positive_sampled, negative_sampled: list of bool · positive_q, negative_q, weight: float64 |

A `.arrow` file is memory-mapped when read, so that a large one costs a trainer no memory.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from evolve.files import Place, place, publish_file, readable
from evolve.types import StepPair, Trajectory

Row = TypeVar("Row", Trajectory, StepPair)

_IDS = pa.list_(pa.int32())
_FLAGS = pa.list_(pa.bool_())
_ARROW_TYPES = {
    "str": pa.string(),
    "int": pa.int32(),
    "bool": pa.bool_(),
    "float": pa.float64(),
    "tuple[int, ...]": _IDS,
    "tuple[bool, ...]": _FLAGS,
}


def schema(row_type: type[Trajectory] | type[StepPair]) -> pa.Schema:
    """The Arrow schema of a row type."""
    return pa.schema([(f.name, _ARROW_TYPES[str(f.type)]) for f in fields(row_type)])


def to_table(rows: Sequence[Row], row_type: type[Row] | None = None) -> pa.Table:
    """Rows as an Arrow table. `row_type` is needed where there may be no row to take it from."""
    if row_type is None:
        if not rows:
            raise ValueError("to_table: no rows to take the schema from; pass row_type")
        row_type = type(rows[0])
    layout = schema(row_type)
    columns = [pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in layout]
    return pa.Table.from_arrays(columns, schema=layout)


def from_table(table: pa.Table, row_type: type[Row]) -> list[Row]:
    """The rows of a table written by `to_table`."""
    names = [f.name for f in fields(row_type)]
    columns = [table.column(name).to_pylist() for name in names]
    lists = {name for name in names if pa.types.is_list(table.schema.field(name).type)}
    rows: list[Row] = []
    for values in zip(*columns, strict=True):
        named: dict[str, Any] = dict(zip(names, values, strict=True))
        named.update({name: tuple(named[name]) for name in lists})
        rows.append(row_type(**named))
    return rows


def write(table: pa.Table, path: str | Place) -> None:
    """Publish a table at `path` (`.parquet` or `.arrow`): written beside, synced, renamed."""
    path = place(path)
    if path.suffix == ".parquet":
        publish_file(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
    elif path.suffix == ".arrow":
        publish_file(path, lambda aside: _write_arrow(table, aside))
    else:
        raise ValueError(f"{path}: rows are written as .parquet or .arrow, not {path.suffix!r}")


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _open_arrow(path: Place) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path)) if isinstance(path, Path) else readable(path))


def read(paths: Sequence[str | Place]) -> pa.Table:
    """The rows of several files, one after the other."""
    tables = []
    for path in map(place, paths):
        if path.suffix == ".parquet":
            tables.append(pq.read_table(readable(path)))
        elif path.suffix == ".arrow":
            tables.append(_open_arrow(path).read_all())
        else:
            raise ValueError(f"{path}: rows are read from .parquet or .arrow, not {path.suffix!r}")
    return pa.concat_tables(tables)
