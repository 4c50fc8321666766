"""Training rows on disk."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from evolve.learn import rows
from evolve.types import StepPair, Trajectory


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_come_back_as_they_were(
    tmp_path: Path,
    suffix: str,
    trajectories: Callable[..., list[Trajectory]],
    step_pairs: Callable[..., list[StepPair]],
) -> None:
    for kind, some in ((Trajectory, trajectories(3)), (StepPair, step_pairs(2))):
        path = tmp_path / f"{kind.__name__}{suffix}"
        rows.write(rows.to_table(some), path)
        assert rows.from_table(rows.read([path, path]), kind) == some + some
        assert [p.name for p in tmp_path.glob(".*")] == []


def test_no_rows_make_a_file_with_the_schema(tmp_path: Path) -> None:
    rows.write(rows.to_table([], StepPair), tmp_path / "none.parquet")
    table = rows.read([tmp_path / "none.parquet"])
    assert table.schema == rows.schema(StepPair)
    assert table.schema.field("prefix_ids").type == pa.list_(pa.int32())
    with pytest.raises(ValueError, match="row_type"):
        rows.to_table([])


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.csv"):
        rows.read([tmp_path / "rows.csv"])
