"""From trees to training rows, as Ray tasks over part files; however many trees there are, no process holds them all.

Three steps, each leaving files beside the round's own: tasks read a few parts each and leave their rows, sorted by
problem; tasks select among the rows of some problems each, for a problem's trees may lie in any part; one task strings
their files together, row group by row group, in the order of the problems' ids. The driver sees counts only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pyarrow.dataset import dataset

from evolve.files import Place, dataset_of, entries, publish_file, readable, remove_tree
from evolve.learn import rows
from evolve.learn.pairs import deduplicate, mine
from evolve.learn.selection import SelectionCounts, clean_trajectories, select
from evolve.policy.checkpoint import resolve
from evolve.policy.formats import format_named
from evolve.schema import PPMConfig, SFTConfig
from evolve.service import get
from evolve.store.trees import read_part
from evolve.tree import ROOT, Tree
from evolve.types import Step, StepPair, Trajectory


@dataclass(frozen=True, slots=True)
class Retokenise:
    """How to turn a bootstrap model's trees into rows for the base model.

    The one case in which token ids are not those sampled: the bootstrap model saw examples before the question, and may
    have another tokenizer.
    """

    tokenizer: str
    """Directory of the base model, as `checkpoint.resolve` takes it."""
    format: str
    questions: Mapping[str, str]
    """By problem id."""
    same_tokenizer: bool
    """Only the prompt is replaced; the steps keep their ids."""

    def apply(self, trees: Sequence[Tree]) -> None:
        """Replace the token ids of `trees` in place."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve(self.tokenizer))
        fmt = format_named(self.format)

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        for tree in trees:
            tree.prompt_ids = encode(fmt.prompt(self.questions[tree.problem_id]))
            if self.same_tokenizer:
                continue
            for node in range(ROOT + 1, len(tree)):
                tree.token_ids[node] = encode(tree.text[node])
                if tree.inserted_ids[node]:
                    step = Step(tree.text[node], tree.code[node], tree.code_ended[node])
                    tree.inserted_ids[node] = encode(fmt.inserted(step, tree.stdout[node]))


GROUP_PARTS = 16
"""Part files that one task reads, one after the other."""
BUCKET_PROBLEMS = 2000
"""Problems whose rows one task selects among."""
ROW_GROUP = 1024
"""Rows that are read and written at a time."""
_ROW_TYPES = {"sft": Trajectory, "ppm": StepPair}
_COUNTS = {"sft": tuple(field.name for field in fields(SelectionCounts)), "ppm": ("pairs", "problems")}


@dataclass(frozen=True, slots=True)
class RowsFiles:
    """Where training rows go."""

    sft: Place
    ppm: Place
    scratch: Place
    """A directory of the extraction's own, on storage that all nodes see; removed at its end."""


def extract(
    parts: Sequence[Place],
    problems: Collection[str],
    synthetic: Collection[str],
    rows_files: RowsFiles,
    sft: SFTConfig,
    ppm: PPMConfig,
    retokenise: Retokenise | None,
    timeout_s: float,
) -> dict[str, dict[str, Any]]:
    """Make the rows of `parts` durable; returns `{"sft": counts, "ppm": counts}`.

    Args:
        parts: part files of whole trees.
        problems: ids of all their problems.
        synthetic: those of them that a model made.
        rows_files: where the rows go.
        sft: how trajectories are selected.
        ppm: how step pairs are mined.
        retokenise: how to turn a bootstrap model's trees into rows for the base model; None: as sampled.
        timeout_s: longest time each of the three steps may take.

    Raises:
        ServiceError: a step took longer.
    """
    scratch = rows_files.scratch
    remove_tree(scratch)
    scratch.mkdir(parents=True)
    groups = [parts[first : first + GROUP_PARTS] for first in range(0, len(parts), GROUP_PARTS)]
    retokenise_once, synthetic_once = ray.put(retokenise), ray.put(synthetic)  # large, and the same for all tasks
    mined = [_mine.remote(group, scratch, number, ppm, retokenise_once) for number, group in enumerate(groups)]
    get(mined, timeout_s, "the extraction of training rows")
    ids = sorted(problems)
    buckets = [ids[first : first + BUCKET_PROBLEMS] for first in range(0, len(ids), BUCKET_PROBLEMS)]
    selected = [
        _select.remote((bucket[0], bucket[-1]), scratch, number, sft, synthetic_once)
        for number, bucket in enumerate(buckets)
    ]
    counts = get(selected, timeout_s, "the selection of training rows")
    joined = [_join.remote(scratch, kind, path) for kind, path in (("sft", rows_files.sft), ("ppm", rows_files.ppm))]
    get(joined, timeout_s, "the training rows to be written")
    remove_tree(scratch)
    return {
        kind: {name: sum(found[kind][name] for found in counts) for name in names} for kind, names in _COUNTS.items()
    }


@ray.remote(num_cpus=0.5)
def _mine(paths: Sequence[Place], scratch: Place, number: int, ppm: PPMConfig, retokenise: Retokenise | None) -> None:
    """Leave the trajectories and step pairs of some part files, sorted by problem."""
    found: dict[str, list[pa.Table]] = {"trajectories": [], "pairs": []}
    for path in paths:
        trees = read_part(path)
        if retokenise is not None:
            retokenise.apply(trees)
        trajectories = [t for tree in trees for t in clean_trajectories(tree)]
        found["trajectories"].append(rows.to_table(trajectories, Trajectory))
        found["pairs"].append(rows.to_table([pair for tree in trees for pair in mine(tree, ppm)], StepPair))
    for kind, tables in found.items():
        _write(pa.concat_tables(tables).sort_by("problem_id"), scratch / f"{kind}-{number:06}.parquet")


@ray.remote(num_cpus=0.5)
def _select(
    span: tuple[str, str], scratch: Place, number: int, sft: SFTConfig, synthetic: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Select among the rows of the problems from `span[0]` to `span[1]`, leave what is kept, count it."""
    trajectories = rows.from_table(_rows_of(span, scratch, "trajectories"), Trajectory)
    pairs = rows.from_table(_rows_of(span, scratch, "pairs"), StepPair)
    kept, counts = select(trajectories, sft, synthetic)
    distinct = deduplicate(sorted(pairs, key=lambda p: (p.problem_id, p.tree, p.node, p.kind)))
    _write(rows.to_table(kept, Trajectory), scratch / f"sft-{number:06}.parquet")
    _write(rows.to_table(distinct, StepPair), scratch / f"ppm-{number:06}.parquet")
    problems = len({pair.problem_id for pair in distinct})
    return {"sft": asdict(counts), "ppm": {"pairs": len(distinct), "problems": problems}}


def _rows_of(span: tuple[str, str], scratch: Place, kind: str) -> pa.Table:
    """The rows of some problems; row groups that hold none of them are not read."""
    files = dataset_of(entries(scratch, f"{kind}-*.parquet"))
    column = pc.field("problem_id")
    return dataset(**files, format="parquet").to_table(
        filter=(column >= span[0]) & (column <= span[1]), use_threads=False
    )


@ray.remote(num_cpus=0.5)
def _join(scratch: Place, kind: str, target: Place) -> None:
    """Publish the files of one kind, in the order of their problems, as one."""

    def stream(aside: Path) -> None:
        with pq.ParquetWriter(aside, rows.schema(_ROW_TYPES[kind]), compression="zstd") as writer:
            for path in entries(scratch, f"{kind}-*.parquet"):
                file = pq.ParquetFile(readable(path))
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))

    publish_file(target, stream)


def _write(table: pa.Table, path: Place) -> None:
    publish_file(path, lambda aside: pq.write_table(table, aside, row_group_size=ROW_GROUP))
