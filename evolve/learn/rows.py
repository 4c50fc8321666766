"""Training rows on disk: one Parquet (or Arrow IPC) row a `Trajectory` or `StepPair`.

Columns are the fields of the dataclass, by the same names, in the same order:

| type | columns |
|---|---|
| Trajectory | problem_id, text, answer: string · round, tree, node: int32 · correct: bool · q, logprob: float64 · prompt_ids, token_ids: list of int32 · sampled: list of bool |
| StepPair | problem_id, kind: string · round, tree, node: int32 · prefix_ids, positive_ids, negative_ids: list of int32 · positive_sampled, negative_sampled: list of bool · positive_q, negative_q, weight: float64 |

Rows last as Parquet. A trainer's processes read them from one `.arrow` file that `gather` makes: it is memory-mapped, so
that however many rows there are they cost no process any memory, and a node's processes share what is cached of them.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from evolve.files import Place, local_file, place, publish_file, readable
from evolve.types import StepPair, Trajectory

Row = TypeVar("Row", Trajectory, StepPair)

BATCH_ROWS = 1024
"""Rows that `gather` holds at a time."""

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


def batches(path: str | Place) -> Iterator[pa.RecordBatch]:
    """The rows of a file, a part of it in memory at a time.

    Raises:
        ValueError: it is neither `.parquet` nor `.arrow`.
    """
    path = place(path)
    if path.suffix == ".parquet":
        with pq.ParquetFile(readable(path)) as file:
            yield from file.iter_batches(BATCH_ROWS)
    elif path.suffix == ".arrow":
        with _open_arrow(path) as file:
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        raise ValueError(f"{path}: rows are read from .parquet or .arrow, not {path.suffix!r}")


def gather(
    paths: Sequence[str | Place],
    target: Place,
    row_type: type[Row],
    keep: Callable[[str], bool] = lambda problem: True,
) -> None:
    """Publish the rows of several files, one file after the other, as one `.arrow`; of those problems to `keep`."""
    layout = schema(row_type)

    def stream(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, layout) as writer:
            for path in paths:
                for batch in batches(path):
                    kept = batch.filter(pa.array(map(keep, batch.column("problem_id").to_pylist()), pa.bool_()))
                    if kept.num_rows:
                        writer.write_batch(kept.cast(layout))

    publish_file(target, stream)


def read(path: str | Place) -> pa.Table:
    """The rows of a file; those of an `.arrow` file on a disk stay there until they are looked at."""
    path = place(path)
    if path.suffix == ".arrow":
        return _open_arrow(path).read_all()
    if path.suffix == ".parquet":
        return pq.read_table(readable(path))
    raise ValueError(f"{path}: rows are read from .parquet or .arrow, not {path.suffix!r}")


def _open_arrow(path: Place) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(local_file(path))))
