"""What part files of trees say of the trees, in a few numbers each: for a board that begins where others ended."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolve.errors import StorageError
from evolve.files import Place, readable
from evolve.search.budget import TreeSummary
from evolve.tree import ROOT
from evolve.types import Status


@dataclass(frozen=True, slots=True)
class Summaries:
    """The trees of part files, each with the name of its part, read as they are iterated over.

    Small to send to the actor that wants them; one file is in memory at a time.
    """

    directory: Place
    parts: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[TreeSummary, str]]:
        columns = ["rollouts", "sampled_tokens", "scored_tokens", "infrastructure_failures"]
        for name in self.parts:
            wanted = ["problem_id", "tree", "correct", "code", "status", *columns]
            table = pq.read_table(readable(self.directory / name), columns=wanted, page_checksum_verification=True)
            table = table.append_column("right", pc.cast(pc.fill_null(table["correct"], False), pa.int32()))
            table = table.append_column("graded", pc.cast(pc.is_valid(table["correct"]), pa.int32()))
            executed = pc.and_(
                pc.not_equal(table["code"], ""), pc.not_equal(table["status"], Status.INFRASTRUCTURE.value)
            )
            table = table.append_column("executed", pc.cast(executed, pa.int32()))
            sums = [(column, "sum") for column in ("right", "graded", "executed")]
            grouped = table.group_by(["problem_id", "tree"], use_threads=False).aggregate(
                [("right", "count"), *sums, *((column, "max") for column in columns)]
            )
            for row in grouped.to_pylist():
                summary = TreeSummary(
                    problem_id=row["problem_id"],
                    number=row["tree"],
                    nodes=row["right_count"],
                    correct=row["right_sum"],
                    wrong=row["graded_sum"] - row["right_sum"],
                    executions=row["executed_sum"],
                    **{column: row[f"{column}_max"] for column in columns},
                )
                yield summary, name


@dataclass(frozen=True, slots=True)
class Earlier:
    """The part files of a round before, from which only is taken how long its problems' trees were."""

    directory: Place
    parts: tuple[str, ...]

    def tokens_a_rollout(self, wanted: Container[str]) -> tuple[dict[str, float], str]:
        """By problem, of those `wanted`, the tokens that a rollout took; and a note on what could not be read, if any.

        This only says what to grow first, so that a damaged part costs no more than that.
        """
        sums: dict[str, tuple[int, int]] = {}
        unread: list[str] = []
        for name in self.parts:
            try:
                found = list(self._trees(name))
            except (OSError, pa.ArrowException, KeyError, StorageError) as error:
                unread.append(f"{self.directory / name}: {str(error).splitlines()[0]}")
                continue
            for problem, tokens, rollouts in found:
                if problem in wanted:
                    before = sums.get(problem, (0, 0))
                    sums[problem] = (before[0] + tokens, before[1] + rollouts)
        rates = {problem: tokens / rollouts for problem, (tokens, rollouts) in sums.items() if rollouts}
        note = f"{len(unread)} part files of the round before cannot be read ({unread[0]})" if unread else ""
        return rates, note and f"{note}; how long their problems take is not known beforehand, and nothing else is lost"

    def _trees(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Problem, sampled tokens and rollouts of each tree of a part."""
        columns = ["problem_id", "sampled_tokens", "rollouts"]
        table = pq.read_table(
            readable(self.directory / name), columns=[*columns, "node"], page_checksum_verification=True
        )
        roots = table.filter(pc.field("node") == ROOT)
        yield from zip(*(roots.column(column).to_pylist() for column in columns), strict=True)
