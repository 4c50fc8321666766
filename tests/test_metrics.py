"""Metrics of a run: what becomes of them where Weights & Biases cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from evolve.config import load
from evolve.report import Metrics
from evolve.store.run import RunDirectory

KEY = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    "error", [wandb.errors.CommError(f"timed out with {KEY}"), wandb.errors.AuthenticationError(KEY), TimeoutError(KEY)]
)
def test_a_run_goes_on_offline_where_wandb_does_not_begin_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    begun: list[tuple[str, str]] = []
    logged: list[dict[str, Any]] = []
    ended: list[float] = []

    def init(mode: str, name: str, settings: wandb.Settings, **_: object) -> Any:
        begun.append((mode, name))
        if mode == "online":
            raise error
        config = SimpleNamespace(update=lambda *_, **__: None)
        return SimpleNamespace(config=config, log=logged.append, finish=lambda: ended.append(settings.finish_timeout))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    metrics = Metrics(RunDirectory(tmp_path), load(["conf=smoke", "run.name=x", "wandb.mode=auto"]), said.append)
    for round_ in (1, 2):
        metrics.log(round_, {"search/solved": round_})
    metrics.close()
    assert begun == [("online", "x round 1"), ("offline", "x round 1"), ("offline", "x round 2")]
    assert logged == [{"search/solved": 1}, {"search/solved": 2}]
    assert len(said) == 1
    assert type(error).__name__ in said[0]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in said[0]
    assert KEY not in said[0]
    assert len(ended) == 2
    assert all(0 < seconds <= 60 for seconds in ended)
    assert [json.loads(line)["round"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("dies", ["while it logs", "while it ends"])
def test_a_run_goes_on_without_wandb_when_its_core_dies_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    begun: list[str] = []
    torn_down: list[bool] = []

    def reset(*_: object) -> None:
        raise ConnectionResetError(KEY)

    def init(name: str, **_: object) -> Any:
        begun.append(name)
        config = SimpleNamespace(update=lambda *_, **__: None)
        return SimpleNamespace(config=config, log=reset if dies == "while it logs" else lambda _: None, finish=reset)

    def teardown() -> None:
        torn_down.append(True)
        reset()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", teardown)
    said: list[str] = []
    metrics = Metrics(RunDirectory(tmp_path), load(["conf=smoke", "run.name=x", "wandb.mode=offline"]), said.append)
    for round_ in (1, 2, 3):
        metrics.log(round_, {"search/solved": round_})
    metrics.close()
    assert len(begun) == (1 if dies == "while it logs" else 3)
    assert said == [f"note: W&B failed (ConnectionResetError); metrics go to {tmp_path}/metrics.jsonl alone"]
    assert torn_down == [True], "its hook would try again at the exit"
    assert [json.loads(line)["round"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
