"""Files of this node's file systems made durable: written aside, synced, renamed. `evolve.files` is for all places."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def aside_of(path: Path) -> Path:
    """A name beside `path` for what is being written; `asides` knows it again."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def asides(directory: Path) -> list[Path]:
    """What is being written below `directory`, or was by a process that was killed."""
    return [path for path in directory.rglob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name)]


def settle_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a name aside of `path`, then move the result into place durably."""
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def settle_directory(aside: Path, path: Path) -> None:
    """Rename a finished directory to `path`, which must not exist, durably."""
    for entry in [*aside.rglob("*"), aside]:
        sync(entry)
    aside.rename(path)
    sync(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory with all that is in it, where there is one."""
    if path.exists():
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
