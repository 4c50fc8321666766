"""How a run is opened and ended, with doubles for all that would start anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.config import load
from evolve.stages import run


def double(ended: list[str], name: str) -> Callable[..., Any]:
    """Makes what has every way to end, and tells when it did."""
    tell = lambda: ended.append(name)  # noqa: E731
    return lambda *_, **__: SimpleNamespace(
        start=lambda: None, acquire=lambda: None, release=tell, cut=tell, close=tell, stop=tell
    )


def test_what_holds_accelerators_ends_before_wandb_and_the_lock_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    names = {"driver_lock": "lock", "Lifeline": "lifeline", "TrainerGroup": "trainers", "Fleet": "fleet"}
    for attribute, name in names.items():
        monkeypatch.setattr(run, attribute, double(ended, name))
    monkeypatch.setattr(run.report, "Metrics", double(ended, "metrics"))
    monkeypatch.setattr(run.cluster, "connect", lambda _: "cpu")
    for attribute in ("obey_signals", "trainer_workers", "_base_model"):
        monkeypatch.setattr(run, attribute, lambda *_: None)
    (tmp_path / "x").mkdir()
    with run.open_run(load(["conf=smoke", f"run.dir={tmp_path}", "run.name=x"])):
        assert ended == []
    assert ended == ["fleet", "trainers", "lifeline", "metrics", "lock"]
