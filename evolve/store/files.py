"""Durable files: written aside, fsynced, renamed. Nothing half-written ever has its final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a name aside of `path`, then move the result into place durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def publish_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_file(path, lambda aside: aside.write_text(text))


@contextlib.contextmanager
def publish_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill; on a clean exit it becomes `path`, replacing what was there.

    On an error nothing of it remains and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                sync(file)
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_digest(path: Path) -> str:
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
