"""Part files as others read them: without this project, from the documented schema alone."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evolve.store.trees import SCHEMA, read_part, to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind, Status


def tree(problem: str) -> Tree:
    made = Tree(problem, 1, 0, 9, (5, 6), policy_digest="d")
    step = made.add(0, NodeKind.STEP, "# a", "a = 1", (7, 8), (-0.5, -0.25), inserted_ids=(3,), stdout="1\n")
    made.add(step, NodeKind.TERMINAL, "# b", "print(a)", (9,), (-0.125,), answer="1", correct=True)
    made.add(0, NodeKind.DEAD, "# c", "1/0", (4,), (-2.0,), status=Status.ERROR)
    for node in (0, 1, 2):
        made.visits[node], made.value_sum[node] = 1, 1.0
    made.ends.append((2, 1.0))
    made.rollouts = 1
    return made


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / write_part(tmp_path, "part-a", [to_batch(tree("p0")), to_batch(tree("p1"))]).name


def test_pandas_reads_a_row_a_node(part: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(part)
    assert list(frame.columns) == SCHEMA.names
    assert frame.groupby("problem_id")["node"].count().to_dict() == {"p0": 4, "p1": 4}
    step = frame[(frame.problem_id == "p1") & (frame.node == 1)].iloc[0]
    assert (step.kind, step.q, step.visits, list(step.token_ids)) == ("step", 1.0, 1, [7, 8])
    assert frame[frame.kind == "terminal"]["correct"].tolist() == [True, True]


def test_datasets_reads_a_row_a_node(part: Path, tmp_path: Path) -> None:
    import datasets

    found = datasets.Dataset.from_parquet(str(part), cache_dir=str(tmp_path / "cache"))
    assert found.column_names == SCHEMA.names
    assert found[2]["answer"] == "1"
    assert found[2]["logprobs"] == [-0.125]
    assert found[0]["correct"] is None


def test_duckdb_reads_a_row_a_node(part: Path) -> None:
    import duckdb

    query = "select depth, kind, count(*), avg(q) from '{}/*.parquet' group by all order by all"  # as in the README
    assert duckdb.sql(query.format(part.parent)).fetchall() == [
        (0, "root", 2, 1.0), (1, "dead", 2, 0.0), (1, "step", 2, 1.0), (2, "terminal", 2, 1.0),
    ]  # fmt: skip


def test_every_column_says_in_the_file_what_it_is(part: Path) -> None:
    schema = pq.read_schema(part)
    assert schema.metadata[b"format"].startswith(b"evolve.tree.")
    for field in schema:
        assert field.metadata[b"doc"], field.name
        plain = field.type.value_type if pa.types.is_list(field.type) else field.type
        assert plain in {pa.string(), pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64()}, field.name


def test_a_part_of_another_schema_is_refused_by_its_name(part: Path) -> None:
    other = pq.read_table(part).drop_columns(["note"]).replace_schema_metadata({"format": "evolve.tree.1"})
    pq.write_table(other, part)
    with pytest.raises(ValueError, match=r"holds trees as evolve\.tree\.1, this version reads evolve\.tree\.2"):
        read_part(part)


def test_a_tree_with_a_missing_row_is_refused(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table.slice(0, 2), table.slice(3)]), part)
    with pytest.raises(ValueError, match="not one whole tree"):
        read_part(part)


def test_trees_come_back_as_they_were(part: Path) -> None:
    assert read_part(part) == [tree("p0"), replace(tree("p0"), problem_id="p1")]
