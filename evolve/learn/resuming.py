"""Checkpoints of a training that was interrupted: which one can be gone on from, and with how many workers."""

from __future__ import annotations

import json
from dataclasses import dataclass

from evolve.files import Place, entries, file_digest, is_published, local_directory, remove_tree
from evolve.remote import Damaged


@dataclass(frozen=True, slots=True)
class _Meta:
    """What a checkpoint's `meta.json` says of it."""

    step: int
    plan: str
    workers: int
    files: dict[str, str]
    """Digest of each of its files, by name."""


def find_checkpoint(directory: Place, plan: str) -> tuple[int, str | None]:
    """Steps done by the newest usable checkpoint (0: none), and why one that exists is unusable.

    A checkpoint belongs to a plan: the same rows, settings and number of workers.
    """
    newest = _newest(directory)
    if newest is None:
        return 0, None
    try:
        here = local_directory(newest)
        meta = _meta(here)
    except (Damaged, FileNotFoundError) as error:
        return 0, f"{error}: starting afresh"
    if meta.plan != plan:
        return 0, f"{newest} was made with other rows, settings or number of workers: starting afresh"
    for name, expected in meta.files.items():
        file = here / name
        # Loading would not notice: torch's archives are read without their checksums.
        if not file.is_file() or file_digest(file) != expected:
            return 0, f"{file} is missing or damaged: starting afresh"
    return meta.step, None


def workers_of_checkpoint(directory: Place) -> int | None:
    """How many workers made the newest checkpoint, as many as must go on from it; None where there is none to read."""
    newest = _newest(directory)
    try:
        return None if newest is None else _meta(newest).workers
    except (Damaged, FileNotFoundError):
        return None


def discard_checkpoints(directory: Place, but: int | None = None) -> None:
    """Remove all checkpoints in `directory`, except that made after `but` steps."""
    for old in entries(directory, "checkpoint-*"):
        if old.name != f"checkpoint-{but}":
            remove_tree(old)


def _newest(directory: Place) -> Place | None:
    found = filter(is_published, entries(directory, "checkpoint-*"))
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _meta(checkpoint: Place) -> _Meta:
    """What is known of a checkpoint.

    Raises:
        FileNotFoundError, Damaged: nothing that can be read.
    """
    file = checkpoint / "meta.json"
    try:
        known = json.loads(file.read_text())
        return _Meta(int(known["step"]), str(known["plan"]), int(known["workers"]), dict(known["files"]))
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{file} is damaged") from error
