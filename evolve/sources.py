"""Rows of a problem set, from JSON lines, Parquet, a data set directory, or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evolve.schema import ProblemsConfig

Row = tuple[str, int, Mapping[str, Any]]
"""Where a row stands, for messages; its number in its source from 0; its columns (none: a blank line)."""


def rows_of(path: str, problems: ProblemsConfig) -> Iterator[Row | str]:
    """Rows of any source; an error is yielded as text, so that all can be reported together."""
    local = Path(path).expanduser()
    if local.is_dir():
        yield from _directory(local, problems)
    elif local.suffix in (".jsonl", ".parquet") and not local.is_file():
        yield f"{path}: no such file; set problems.path (or problems.test_path) to an existing one"
    elif local.suffix == ".jsonl":
        yield from _json_lines(local)
    elif local.suffix == ".parquet":
        yield from _parquet(local)
    elif local.exists():
        yield f"{path}: unknown kind of file; problems come as .jsonl, .parquet or a data set directory"
    else:
        yield from _hub(path, problems)


def _json_lines(path: Path) -> Iterator[Row | str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            where = f"{path.name}:{number + 1}"
            if not line.strip():
                yield where, number, {}
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"{where}: malformed JSON: {error}"
                continue
            if isinstance(row, dict):
                yield where, number, row
            else:
                yield f"{where}: a JSON {type(row).__name__}, not an object with columns"


def _parquet(path: Path) -> Iterator[Row | str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    yield f"{path.name} row {number}", number, row
                    number += 1
    except (OSError, pa.ArrowException) as error:
        yield f"{path}: cannot be read as Parquet: {error}"


def _directory(path: Path, problems: ProblemsConfig) -> Iterator[Row | str]:
    import datasets

    saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
    try:
        if saved:
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if problems.split not in data:
                    yield f"{path}: no split {problems.split!r}; problems.split is one of {', '.join(data)}"
                    return
                data = data[problems.split]
        else:
            data = datasets.load_dataset(str(path), problems.subset, split=problems.split)
    except Exception as error:  # `datasets` raises whatever its readers raise; all of it goes to the user
        yield f"{path}: cannot be read as a data set: {type(error).__name__}: {error}"
        return
    yield from _data_set(path.name, data)


def _hub(name: str, problems: ProblemsConfig) -> Iterator[Row | str]:
    import datasets

    try:
        data = datasets.load_dataset(name, problems.subset, split=problems.split)
    except Exception as error:  # network, hub and reader errors of many types; all of it goes to the user
        yield (
            f"{name}: no such file or directory, and not readable as a Hugging Face data set "
            f"(split {problems.split!r}): {type(error).__name__}: {error}"
        )
        return
    yield from _data_set(name.rpartition("/")[2], data)


def _data_set(name: str, data: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(data):
        yield f"{name} row {number}", number, row
