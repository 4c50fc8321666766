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
        ppm/               rows.parquet, validation.parquet, checkpoint/
        eval/              results.json and one row a problem as Parquet

An artefact counts as finished when the manifest names it, and it is named there only after it was renamed into place.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evolve.errors import EvolveError
from evolve.store.files import publish_json


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
                f"{path} is not readable ({error}). The artefacts beside it are whole; restore the file from a "
                f"backup, or delete the round's directory to run the round again."
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


class Lock:
    """At most one driver on a run directory.

    The lock names its holder's host, process and start time; one whose process is gone (same host) is stale and is
    taken over.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.path / "lock.json"
        self._held = False

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: another driver holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        for _ in range(2):
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_if_stale()
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(me, file)
            self._held = True
            return
        raise RunError(f"cannot take {self._path}: another driver took it at the same moment. Try again.")

    def _remove_if_stale(self) -> None:
        try:
            holder = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            holder = {}
        if holder.get("host") == socket.gethostname():
            try:
                alive = abs(psutil.Process(holder["pid"]).create_time() - holder["process_started"]) < 1.0
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                self._path.unlink(missing_ok=True)
                return
        raise RunError(
            f"{self._path.parent} is in use by another driver: host {holder.get('host', '?')}, process "
            f"{holder.get('pid', '?')}, since {holder.get('since', '?')}. Wait for it or end it; use another "
            f"run.name for a second run. If that machine is gone for good, delete {self._path}."
        )

    def release(self) -> None:
        """Give the lock back."""
        if self._held:
            self._path.unlink(missing_ok=True)
            self._held = False
