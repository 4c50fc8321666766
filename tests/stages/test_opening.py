"""How a run is opened and ended, with doubles for all that would start anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from evolve.config import load
from evolve.stages import run
from evolve.store.run import RunDirectory, RunError


def double(ended: list[str], name: str) -> Callable[..., Any]:
    """Makes what has every way to end, and tells when it did."""
    tell = lambda: ended.append(name)  # noqa: E731
    return lambda *_, **__: SimpleNamespace(
        start=lambda: None, acquire=lambda: None, release=tell, cut=tell, close=tell, stop=tell
    )


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has ended, in order, of a run whose parts are all doubles."""
    ended: list[str] = []
    names = {"driver_lock": "lock", "Lifeline": "lifeline", "TrainerGroup": "trainers", "Fleet": "fleet"}
    for attribute, name in names.items():
        monkeypatch.setattr(run, attribute, double(ended, name))
    monkeypatch.setattr(run.report, "Metrics", double(ended, "metrics"))
    monkeypatch.setattr(run.cluster, "connect", lambda _: "cpu")
    for attribute in ("obey_signals", "trainer_workers", "_base_model"):
        monkeypatch.setattr(run, attribute, lambda *_: None)
    (tmp_path / "x").mkdir()
    return ended


def test_what_holds_accelerators_ends_before_wandb_and_the_lock_last(tmp_path: Path, ended: list[str]) -> None:
    with run.open_run(load(["conf=smoke", f"run.dir={tmp_path}", "run.name=x"])):
        assert ended == []
    assert ended == ["fleet", "trainers", "lifeline", "metrics", "lock"]


@pytest.mark.parametrize(
    "error",
    [RayTaskError("extract", "Traceback: boom", ValueError("boom")), OutOfMemoryError("boom"), WorkerCrashedError()],
)
def test_a_failure_of_ray_too_ends_with_what_is_safe_and_what_to_type(
    tmp_path: Path, ended: list[str], error: RayError
) -> None:
    directory = RunDirectory(tmp_path / "x")
    for name in ("round-1", "round-1.bak", "round-10", "round-2"):
        (directory.path / name).mkdir()
    directory.round(2).record("search", trees=1)
    (tmp_path / "x" / "round-10" / "manifest.json").write_text("{")
    with (
        pytest.raises(RunError) as stopped,
        run.open_run(load(["conf=smoke", f"run.dir={tmp_path}", "run.name=x", "run.allow_changes=true"])),
    ):
        raise error
    lines = str(stopped.value).splitlines()
    assert lines[:-5] == str(error).splitlines()
    assert lines[-5:-1] == [
        f"Safe in {tmp_path}/x:",
        "  round-1: nothing finished yet",
        "  round-2: search",
        "  round-10: its manifest is not readable",
    ]
    assert lines[-1].startswith("To go on: python -m evolve.driver")
    assert stopped.value.__cause__ is error


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        ({}, True),
        ({1: ("sft", "ppm", "evaluation")}, True),
        ({1: ("sft", "ppm", "evaluation"), 2: ("sft",)}, True),
        ({1: ("sft", "ppm", "evaluation"), 2: ("sft", "ppm")}, False),
        ({1: ("sft", "ppm", "evaluation"), 2: ("sft", "ppm", "evaluation")}, False),
    ],
)
def test_trainers_start_beside_the_rest_where_a_model_is_left_to_train(
    tmp_path: Path,
    ended: list[str],
    monkeypatch: pytest.MonkeyPatch,
    finished: dict[int, tuple[str, ...]],
    expected: bool,
) -> None:
    started: list[str] = []
    trainers = SimpleNamespace(start=lambda: started.append("trainers"), close=lambda: None)
    monkeypatch.setattr(run, "TrainerGroup", lambda *_, **__: trainers)
    directory = RunDirectory(tmp_path / "x")
    for number, artefacts in finished.items():
        directory.round(number).path.mkdir()
        for artefact in artefacts:
            directory.round(number).record(artefact)
    with run.open_run(load(["conf=smoke", f"run.dir={tmp_path}", "run.name=x", "run.allow_changes=true"])):
        assert started == ["trainers"] * expected


def test_a_manifest_that_is_not_readable_is_refused_before_anything_is_started(
    tmp_path: Path, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.cluster, "connect", lambda _: pytest.fail("Ray was started"))
    (tmp_path / "x" / "round-2").mkdir()
    (tmp_path / "x" / "round-2" / "manifest.json").write_text("{")
    arguments = ["conf=smoke", f"run.dir={tmp_path}", "run.name=x", "run.allow_changes=true"]
    with pytest.raises(RunError, match=r"manifest\.json is not readable .* Delete it"), run.open_run(load(arguments)):
        pass
    assert ended == ["lock"]
