"""Durable files: written aside, fsynced, renamed. Nothing half-written ever has its final name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
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
    """Turn "disk full" and "may not write" into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _SPACE:
            mend = f"Free space there ({_free(path)}), then run the same command"
        elif error.errno in _RIGHTS:
            mend = "Make it writable for this user, or choose another run.dir, then run the same command"
        else:
            raise
        raise StorageError(f"cannot write {path}: {error.strerror}. {mend}; what is finished stays.") from error


def _free(path: Path) -> str:
    with contextlib.suppress(OSError):
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        return f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB are free"
    return "how much is free is not known"


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
