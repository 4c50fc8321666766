"""From part files to training rows: the same rows however the trees lie in parts and however the work is divided."""

from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from evolve.learn import extract as extraction
from evolve.learn import rows
from evolve.learn.extract import RowsFiles, extract
from evolve.learn.pairs import deduplicate, mine
from evolve.learn.selection import clean_trajectories, select
from evolve.schema import PPMConfig, SFTConfig
from evolve.store.trees import to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind, StepPair, Trajectory

pytestmark = pytest.mark.usefixtures("ray_cluster")

SFT, PPM = SFTConfig(trajectories=2), PPMConfig(negative_q=0.5)


def tree(problem: str, number: int) -> Tree:
    """One step, then two correct and two wrong answers, with Q-values of their own."""
    rng = Random(f"{problem}-{number}")
    made = Tree(problem, 1, number, 3, (1, 2))
    step = made.add(0, NodeKind.STEP, "# a", "a = 1", (rng.randrange(9),), (-0.5,))
    for answer in range(4):
        ids, logprobs = (10 + answer, rng.randrange(50)), (-0.125, -0.25)
        made.add(step, NodeKind.TERMINAL, "# b", f"print({answer})", ids, logprobs, answer="1", correct=answer < 2)
    for node in range(len(made)):
        made.visits[node], made.value_sum[node] = 4, rng.uniform(-4, 4)
    return made


def run(directory: Path, trees: list[Tree], a_part: int) -> tuple[dict, list[Trajectory], list[StepPair]]:
    directory.mkdir()
    parts = []
    for first in range(0, len(trees), a_part):
        batches = [to_batch(some) for some in trees[first : first + a_part]]
        parts.append(directory / write_part(directory, f"part-{first:03}", batches).name)
    files = RowsFiles(directory / "sft.parquet", directory / "ppm.parquet", directory / "partial")
    ids = {some.problem_id for some in trees} | {"never searched"}
    counts = extract(parts, ids, (), files, SFT, PPM, None, 120.0)
    assert not files.scratch.exists()
    read = [
        rows.from_table(pq.read_table(path), kind) for path, kind in ((files.sft, Trajectory), (files.ppm, StepPair))
    ]
    return counts, read[0], read[1]


def test_rows_are_those_of_all_trees_together_in_the_order_of_the_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = [tree(f"p{number:02}", copy) for copy in (0, 1) for number in range(13)]
    kept, counted = select([t for some in trees for t in clean_trajectories(some)], SFT)
    pairs = [pair for some in trees for pair in mine(some, PPM)]
    distinct = deduplicate(sorted(pairs, key=lambda p: (p.problem_id, p.tree, p.node, p.kind)))
    # A problem's two trees lie in different parts, which different tasks read.
    monkeypatch.setattr(extraction, "GROUP_PARTS", 2)
    monkeypatch.setattr(extraction, "BUCKET_PROBLEMS", 5)
    counts, found, found_pairs = run(tmp_path / "divided", trees, 3)
    assert found == kept
    assert found_pairs == distinct
    assert counts["sft"]["kept"] == counted.kept == len(kept) > 0
    assert counts["sft"]["wrong"] == counted.wrong
    assert counts["ppm"] == {"pairs": len(distinct), "problems": len({p.problem_id for p in distinct})}


def test_trees_without_any_row_give_empty_files(tmp_path: Path) -> None:
    bare = Tree("p0", 1, 0, 3, (1, 2))
    counts, found, pairs = run(tmp_path / "empty", [bare], 1)
    assert (found, pairs) == ([], [])
    assert counts["sft"]["kept"] == counts["ppm"]["pairs"] == 0
