"""Training rows on disk."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from evolve.learn import rows
from evolve.learn.packing import Completions
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
        assert rows.from_table(rows.read(path), kind) == some
        assert [p.name for p in tmp_path.glob(".*")] == []


def test_no_rows_make_a_file_with_the_schema(tmp_path: Path) -> None:
    rows.write(rows.to_table([], StepPair), tmp_path / "none.parquet")
    table = rows.read(tmp_path / "none.parquet")
    assert table.schema == rows.schema(StepPair)
    assert table.schema.field("prefix_ids").type == pa.list_(pa.int32())
    with pytest.raises(ValueError, match="row_type"):
        rows.to_table([])


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.csv"):
        rows.read(tmp_path / "rows.csv")


def test_rows_of_several_files_are_gathered_in_order_and_those_not_wanted_left_out(
    tmp_path: Path, trajectories: Callable[..., list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", 2)
    some = trajectories(7)
    rows.write(rows.to_table(some), tmp_path / "a.parquet")
    rows.write(rows.to_table(some[:3]), tmp_path / "b.arrow")
    sources = [tmp_path / "a.parquet", tmp_path / "b.arrow"]
    rows.gather(sources, tmp_path / "all.arrow", Trajectory)
    assert rows.from_table(rows.read(tmp_path / "all.arrow"), Trajectory) == some + some[:3]
    rows.gather(sources, tmp_path / "some.arrow", Trajectory, lambda problem: problem == "p1")
    assert rows.from_table(rows.read(tmp_path / "some.arrow"), Trajectory) == [some[1], some[1]]
    rows.gather(sources, tmp_path / "none.arrow", Trajectory, lambda problem: False)
    assert rows.read(tmp_path / "none.arrow").schema == rows.schema(Trajectory)


def test_gathered_rows_take_no_memory_until_they_are_looked_at(
    tmp_path: Path, trajectories: Callable[..., list[Trajectory]]
) -> None:
    rows.gather(_parquet(tmp_path, trajectories(500)), tmp_path / "all.arrow", Trajectory)
    before = pa.total_allocated_bytes()
    table = rows.read(tmp_path / "all.arrow")
    items = Completions(table, 512)
    assert pa.total_allocated_bytes() - before < table.nbytes / 100
    assert len(items.lengths) == 500


def _parquet(directory: Path, some: list[Trajectory]) -> list[Path]:
    rows.write(rows.to_table(some), directory / "rows.parquet")
    return [directory / "rows.parquet"]
