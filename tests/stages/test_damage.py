"""Finished artefacts that were damaged since: made again where that is possible, refused with what to do where not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from evolve.config import load
from evolve.files import file_digest
from evolve.learn.jobs import TrainResult
from evolve.policy.checkpoint import digest
from evolve.stages.learning import _changed_rows, train
from evolve.stages.run import Run, checkpoint
from evolve.stages.search import _parts, _reopened
from evolve.store.run import RoundDirectory, RunDirectory, RunError
from evolve.store.trees import to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind


@pytest.fixture
def directory(tmp_path: Path) -> RoundDirectory:
    """A round with a finished search of three trees in two parts."""
    made = RunDirectory(tmp_path).round(1)
    made.trees.mkdir(parents=True)
    for stem, problems in (("part-a", ("p0", "p1")), ("part-b", ("p2",))):
        write_part(made.trees, stem, [to_batch(tree(problem)) for problem in problems])
    made.record("search", parts={path.name: file_digest(path) for path in made.trees.iterdir()}, trees=3)
    return made


def tree(problem: str) -> Tree:
    made = Tree(problem, 1, 0, 9, (5, 6))
    made.add(0, NodeKind.TERMINAL, "# b", "print(1)", (8,), (-0.25,), answer="1", correct=True)
    return made


def run_saying(said: list[str]) -> Any:
    return SimpleNamespace(line=SimpleNamespace(end=said.append))


def part(directory: RoundDirectory, letter: str) -> Path:
    assert isinstance(directory.trees, Path)
    return next(directory.trees.glob(f"part-{letter}-*"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_a_whole_search_stays_finished(directory: RoundDirectory) -> None:
    assert not _reopened(run_saying([]), directory)
    assert directory.finished("search") is not None


def test_a_search_with_a_damaged_part_is_taken_up_again_without_it(directory: RoundDirectory) -> None:
    whole, broken = part(directory, "a"), part(directory, "b")
    flip(broken, 30)
    said: list[str] = []
    assert _reopened(run_saying(said), directory)
    assert f"{broken.name}: its digest is not the one in the manifest" in said[0]
    assert directory.finished("search") is None
    assert list(directory.trees.glob("part-*")) == [whole]


def test_parts_that_nobody_needs_any_longer_are_not_looked_at(directory: RoundDirectory) -> None:
    directory.record("rows", sft={}, ppm={}, files={})
    flip(part(directory, "b"), 30)
    assert not _reopened(run_saying([]), directory)


def test_a_stage_whose_trees_do_not_add_up_is_an_error_that_says_so(directory: RoundDirectory) -> None:
    progress: Any = SimpleNamespace(trees=3)
    assert set(_parts(directory, progress)) == {part(directory, letter).name for letter in "ab"}
    part(directory, "b").unlink()
    with pytest.raises(RunError, match=r"3 trees were counted, and the files in .* hold 2\. .*Run the same command"):
        _parts(directory, progress)


def test_rows_that_changed_since_they_were_recorded_are_named(directory: RoundDirectory) -> None:
    directory.sft.mkdir()
    rows = directory.sft / "rows.parquet"
    rows.write_bytes(b"rows of a training")
    directory.record("rows", files={"sft/rows.parquet": file_digest(rows)})
    assert _changed_rows(directory) == []
    flip(rows, 3)
    assert _changed_rows(directory) == [rows]
    rows.unlink()
    assert _changed_rows(directory) == [rows]


@pytest.fixture
def tuned(directory: RoundDirectory) -> Path:
    """The weights of the round's finished fine-tuning."""
    path = directory.sft / "checkpoint"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(1000))
    (path / "config.json").write_text("{}")
    directory.record("sft", digest=digest(path))
    return path / "model.safetensors"


def test_a_checkpoint_with_a_flipped_byte_is_refused_with_what_to_do(directory: RoundDirectory, tuned: Path) -> None:
    assert checkpoint(directory, "sft").digest == digest(tuned.parent)
    flip(tuned, 500)
    with pytest.raises(RunError, match=r"is not the expected .*\n.*Restore .* from a backup") as refused:
        checkpoint(directory, "sft")
    assert "round=1" in str(refused.value)


@pytest.fixture
def run(directory: RoundDirectory) -> Run:
    """All but its configuration and directory are doubles."""
    double: Any = MagicMock()
    double.device = "cpu"
    return Run(load([]), RunDirectory(directory.path.parent), *[double] * 7)


def test_no_ppm_is_trained_from_a_policy_with_a_flipped_byte(run: Run, tuned: Path) -> None:
    flip(tuned, 500)
    with pytest.raises(RunError, match=r"is not the expected"):
        train(run, 1)
    assert not run.trainers.fit.called  # type: ignore[attr-defined]


def test_the_metrics_of_a_stage_are_kept_before_it_counts_as_finished(
    run: Run, directory: RoundDirectory, tuned: Path
) -> None:
    run.trainers.fit.return_value = [TrainResult("ppm", str(tuned.parent), {"loss": 0.5})]  # type: ignore[attr-defined]
    run.metrics.log.side_effect = KeyboardInterrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        train(run, 1)
    assert directory.finished("ppm") is None
    run.metrics.log.side_effect = None  # type: ignore[attr-defined]
    train(run, 1)
    assert directory.finished("ppm") is not None
