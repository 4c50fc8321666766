"""A run is continued with what it was begun with, or refused; what it was begun with is kept."""

from pathlib import Path

import pytest

from evolve.config import load
from evolve.problems import ProblemSet, load_problems
from evolve.schema import EvolveConfig
from evolve.stages.start import check_same_start, inputs_of, record_start
from evolve.store.run import RunDirectory, RunError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model and problems."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(100))
    rows = [f'{{"problem": "What is {number} + 1?", "answer": "{number + 1}"}}' for number in range(10)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows))
    return tmp_path


def begun(files: Path, *changes: str) -> tuple[EvolveConfig, RunDirectory, ProblemSet]:
    paths = [f"policy.model={files}/model", f"problems.path={files}/problems.jsonl", f"run.dir={files}/runs"]
    config = load(["conf=rstar_math", *paths, "problems.test_path=null", "problems.test_size=2", *changes])
    return config, RunDirectory.of(config.run.dir, config.run.name), load_problems(config)


def go_on(files: Path, *changes: str) -> None:
    config, directory, problems = begun(files, *changes)
    inputs = inputs_of(config, problems)
    check_same_start(config, directory, inputs)
    record_start(config, directory, inputs)


def change_model(files: Path) -> None:
    (files / "model" / "model.safetensors").write_bytes(bytes(99) + b"x")


def change_problems(files: Path) -> None:
    path = files / "problems.jsonl"
    path.write_text(path.read_text().replace("What is 3 + 1?", "What is 3 + 1, roughly?"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_model, r"policy\.model: the content of .*/model has changed.*\n.*round 1: search; round 1: sft"),
        (change_problems, r"problems\.path: the content of .*/problems\.jsonl has changed"),
    ],
)
def test_other_inputs_under_the_same_names_are_refused_unless_asked_for(
    files: Path, change: type, expected: str
) -> None:
    for _ in range(2):
        go_on(files)
    begun(files)[1].round(1).path.mkdir()
    begun(files)[1].round(1).record("search", trees=1)
    begun(files)[1].round(1).record("sft", digest="")
    change(files)
    with pytest.raises(RunError, match=rf"was started with other inputs:\n  {expected}") as refused:
        go_on(files)
    assert "run.allow_changes=true to continue" in str(refused.value)
    go_on(files, "run.allow_changes=true")
    go_on(files)


def test_of_another_configuration_its_keys_are_named_and_not_the_inputs_that_follow(files: Path) -> None:
    go_on(files)
    with pytest.raises(RunError, match=r"under another configuration:\n  problems\.limit: 747000 -> 5") as refused:
        go_on(files, "problems.limit=5")
    assert "the content of" not in str(refused.value)


def test_inputs_that_cannot_be_read_are_refused_with_what_to_do(files: Path) -> None:
    go_on(files)
    inputs = files / "runs" / "rstar-math-7b" / "inputs.json"
    inputs.write_text(inputs.read_text()[:20])
    with pytest.raises(RunError, match=r"inputs\.json is not readable .* Delete it"):
        go_on(files)
