"""From trees to training rows, as Ray tasks that run where the part files are.

One task a part reads whole trees and leaves rows; one closing task selects among the rows of all parts and makes them
durable. The driver sees counts and references only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from evolve.learn import rows
from evolve.learn.pairs import deduplicate, mine
from evolve.learn.selection import clean_trajectories, select
from evolve.policy.formats import format_named
from evolve.schema import PPMConfig, SFTConfig
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
    """Directory of the base model."""
    format: str
    questions: Mapping[str, str]
    """By problem id."""
    same_tokenizer: bool
    """Only the prompt is replaced; the steps keep their ids."""

    def apply(self, trees: Sequence[Tree]) -> None:
        """Replace the token ids of `trees` in place."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
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


@ray.remote(num_cpus=0.5)
def _extract(path: Path, ppm: PPMConfig, retokenise: Retokenise | None) -> tuple[pa.Table, pa.Table]:
    """Trajectories and step pairs of one part file."""
    trees = read_part(path)
    if retokenise is not None:
        retokenise.apply(trees)
    trajectories = [t for tree in trees for t in clean_trajectories(tree)]
    pairs = [pair for tree in trees for pair in mine(tree, ppm)]
    return rows.to_table(trajectories, Trajectory), rows.to_table(pairs, StepPair)


@ray.remote(num_cpus=0.5)
def _assemble(
    sft_path: Path, ppm_path: Path, sft: SFTConfig, synthetic: Collection[str], *parts: tuple[pa.Table, pa.Table]
) -> dict[str, dict[str, Any]]:
    """Select among the rows of all parts, write them, count them."""
    trajectories = rows.from_table(pa.concat_tables([part[0] for part in parts]), Trajectory)
    pairs = rows.from_table(pa.concat_tables([part[1] for part in parts]), StepPair)
    kept, counts = select(trajectories, sft, synthetic)
    distinct = deduplicate(sorted(pairs, key=lambda p: (p.problem_id, p.tree, p.node, p.kind)))
    rows.write(rows.to_table(kept, Trajectory), sft_path)
    rows.write(rows.to_table(distinct, StepPair), ppm_path)
    problems = len({pair.problem_id for pair in distinct})
    return {"sft": asdict(counts), "ppm": {"pairs": len(distinct), "problems": problems}}


def begin_extraction(
    parts: Sequence[Path],
    sft_path: Path,
    ppm_path: Path,
    sft: SFTConfig,
    ppm: PPMConfig,
    synthetic: Collection[str],
    retokenise: Retokenise | None,
) -> Any:
    """Start the tasks; the reference is to `{"sft": counts, "ppm": counts}`, once both row files are in place."""
    tables = [_extract.remote(path, ppm, retokenise) for path in parts]
    return _assemble.remote(sft_path, ppm_path, sft, synthetic, *tables)
