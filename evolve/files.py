"""Durable files: written aside, fsynced, renamed. Nothing half-written ever has its final name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from evolve.errors import EvolveError

_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}")
_SPACE = (errno.ENOSPC, errno.EDQUOT)
_RIGHTS = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL_BYTES = 2**20
"""With less a file system counts as full, when something could not be written."""


class StorageError(EvolveError):
    """The file system does not take what must be written; nothing that was published before is harmed."""


def aside_of(path: Path) -> Path:
    """A name beside `path` for what is being written; `remove_asides` knows it again."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a name aside of `path`, then move the result into place durably.

    Raises:
        StorageError: the disk is full, or may not be written to; `path` is as it was.
    """
    aside = aside_of(path)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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


def publish_rows(path: Path, rows: Iterable[Any]) -> None:
    """Publish rows as a JSON list, one a line; one of them is held at a time."""

    def write(aside: Path) -> None:
        with aside.open("w") as file:
            separator = "["
            for row in rows:
                file.write(f"{separator}\n{json.dumps(row, ensure_ascii=False)}")
                separator = ","
            file.write("[]\n" if separator == "[" else "\n]\n")

    publish_file(path, write)


def publish_directory(aside: Path, path: Path) -> None:
    """Make a finished directory appear as `path` all at once, durably; `path` must not exist.

    Raises:
        StorageError: as `publish_file`.
    """
    with storage_errors(path):
        for entry in [*aside.rglob("*"), aside]:
            sync(entry)
        aside.rename(path)
        sync(path.parent)


def remove_asides(directory: Path) -> None:
    """Remove what a killed process was writing below `directory`; for the one who holds its lock."""
    for path in directory.rglob(".*"):
        if _ASIDE.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" and "may not write" into a `StorageError` that says what to do.

    Libraries that write files in their own way (safetensors, torch) fail with exceptions of their own, of which none
    is for a full disk alone: with one of them, a file system that has no room left is taken for the reason.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _SPACE or (number is None and _room(path) < _FULL_BYTES):
            reason = os.strerror(number or errno.ENOSPC)
            mend = f"Free space there ({_room(path) / 2**30:.1f} GiB are free), then run the same command"
        elif number in _RIGHTS and _concerns(error, path):
            reason = os.strerror(number)
            mend = "Make it writable for this user, or choose another run.dir, then run the same command"
        else:
            raise
        raise StorageError(f"cannot write {path}: {reason}. {mend}; what is finished stays.") from error


def _concerns(error: Exception, path: Path) -> bool:
    """Whether what an error names, if anything, is beside or below `path`."""
    name = getattr(error, "filename", None)
    return name is None or Path(str(name)).is_relative_to(path.parent)


def _room(path: Path) -> float:
    """Free bytes of the file system below `path`; inf where that is not known."""
    with contextlib.suppress(OSError):
        existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        return float(shutil.disk_usage(existing).free)
    return math.inf


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
