"""The run directory: the file system is the state.

    runs/NAME/
      config.yaml          the resolved configuration
      lock.json            which driver is at work here
      base/                the base model, where the project makes it (the tiny world)
      metrics.jsonl        every metric, one JSON object a line
      report.json          results of all rounds
      wandb/               W&B's own files
      round-K/
        manifest.json      what is finished: artefact -> digest and counts
        trees/*.parquet    one row a node (evolve.store.trees.SCHEMA)
        sft/               rows.parquet, checkpoint/
        ppm/               rows.parquet, checkpoint/
        eval/              records.json, one record a problem; before, records.partial.jsonl

An artefact counts as finished when the manifest names it, and it is named there only after it was renamed into place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve.errors import EvolveError
from evolve.files import publish_json


class RunError(EvolveError):
    """A run directory cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RoundDirectory:
    """`runs/NAME/round-K`. Round 0 holds the base model's evaluation."""

    path: Path
    number: int

    @property
    def trees(self) -> Path:
        return self.path / "trees"

    @property
    def sft(self) -> Path:
        return self.path / "sft"

    @property
    def ppm(self) -> Path:
        return self.path / "ppm"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    def manifest(self) -> dict[str, Any]:
        """Finished artefacts by name; empty when nothing is finished.

        Raises:
            RunError: the manifest is not readable JSON.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            return {}
        try:
            value: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(
                f"{path} is not readable ({error}). Delete it and run the same command: the trees and checkpoints "
                f"beside it are checked and taken over, rows are extracted and the round is evaluated anew."
            ) from error
        return value

    def finished(self, artefact: str) -> dict[str, Any] | None:
        """The manifest's entry of an artefact, or None when it is not finished."""
        entry: dict[str, Any] | None = self.manifest().get(artefact)
        return entry

    def record(self, artefact: str, **entry: Any) -> None:
        """Name a finished artefact in the manifest. The artefact must be in place already."""
        manifest = self.manifest()
        manifest[artefact] = entry
        publish_json(self.path / "manifest.json", manifest)

    def forget(self, artefact: str) -> None:
        """Take an artefact out of the manifest, so that it is made again."""
        manifest = self.manifest()
        manifest.pop(artefact, None)
        publish_json(self.path / "manifest.json", manifest)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/NAME`."""

    path: Path

    def round(self, number: int) -> RoundDirectory:
        """The directory of round `number`."""
        return RoundDirectory(self.path / f"round-{number}", number)

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"
