"""The run directory: the file system is the state.

    runs/NAME/
      config.yaml          the resolved configuration
      inputs.json          digests of the problems and of the base model, by the keys that name them
      lock.json            which driver is at work here (lock-N.json in an object store)
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

In an object store (`run.dir=s3://bucket/runs`) names are the same; "renamed into place" is one put there, and a
directory counts once its `published.json` was put (`evolve.remote`). Such a store is the truth and all there is: nodes
share nothing else, and what they keep on their own disks may be lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from evolve.errors import EvolveError
from evolve.files import Place, place, publish_json


class RunError(EvolveError):
    """A run directory cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RoundDirectory:
    """`runs/NAME/round-K`. Round 0 holds the base model's evaluation."""

    path: Place
    number: int

    @property
    def trees(self) -> Place:
        return self.path / "trees"

    @property
    def sft(self) -> Place:
        return self.path / "sft"

    @property
    def ppm(self) -> Place:
        return self.path / "ppm"

    @property
    def eval(self) -> Place:
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

    path: Place

    @classmethod
    def of(cls, directory: str, name: str) -> RunDirectory:
        """The run directory `run.dir`/`run.name` of a configuration."""
        return cls((place(directory) / name).absolute())

    def round(self, number: int) -> RoundDirectory:
        """The directory of round `number`."""
        return RoundDirectory(self.path / f"round-{number}", number)

    @property
    def base(self) -> Place:
        return self.path / "base"

    @property
    def metrics(self) -> Place:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Place:
        return self.path / "report.json"

    @property
    def inputs(self) -> Place:
        return self.path / "inputs.json"

    @property
    def config(self) -> Place:
        return self.path / "config.yaml"
