"""Durable files: written aside, fsynced, renamed. Nothing half-written ever has its final name.

A `Place` is where such a file may be: a `Path` on a disk or a shared mount, or a `RemotePath` in an object store, where
writing aside happens on this node's disk and one put takes the place of the renaming (`evolve.remote`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evolve.disk import aside_of, asides, remove_directory, settle_directory, settle_file, sha256
from evolve.errors import StorageError
from evolve.remote import RemotePath, identity, is_uri, working

Place = Path | RemotePath

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_RIGHTS = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL_BYTES = 2**20
"""With less a file system counts as full, when something could not be written."""


def place(text: str | Place) -> Place:
    """What a path or a URI (`s3://bucket/runs`) names."""
    if not isinstance(text, str):
        return text
    return RemotePath(text.rstrip("/")) if is_uri(text) else Path(text.removeprefix("file://"))


def publish_file(path: Place, write: Callable[[Path], object]) -> None:
    """Call `write` on a name aside of `path`, then move the result into place durably.

    Raises:
        StorageError: the disk is full, or may not be written to; `path` is as it was.
    """
    if isinstance(path, RemotePath):
        _upload(path, write)
        return
    with storage_errors(path):
        settle_file(path, write)


def _upload(path: RemotePath, write: Callable[[Path], object]) -> None:
    aside = aside_of(working(path))
    try:
        with storage_errors(aside):
            write(aside)
        path.put_file(aside)
    finally:
        aside.unlink(missing_ok=True)


def publish_json(path: Place, value: Any) -> None:
    """Publish `value` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_file(path, lambda aside: aside.write_text(text))


def publish_rows(path: Place, rows: Iterable[Any]) -> None:
    """Publish rows as a JSON list, one a line; one of them is held at a time."""

    def write(aside: Path) -> None:
        with aside.open("w") as file:
            separator = "["
            for row in rows:
                file.write(f"{separator}\n{json.dumps(row, ensure_ascii=False)}")
                separator = ","
            file.write("[]\n" if separator == "[" else "\n]\n")

    publish_file(path, write)


def publish_directory(aside: Path, path: Place) -> None:
    """Make a finished directory appear as `path` all at once, durably; `path` must not exist. `aside` is gone then.

    Raises:
        StorageError: as `publish_file`.
    """
    if isinstance(path, RemotePath):
        path.withdraw()
        files = path.put_files(aside, files_below(aside))
        path.publish(files)
        path.adopt(aside, files)
        return
    with storage_errors(path):
        settle_directory(aside, path)


def put_share(aside: Path, names: Sequence[str], path: Place) -> dict[str, tuple[int, str]]:
    """Sizes and SHA-256 of some of the files of a directory that several processes make as `path`.

    The first of them calls `publish_shares` then. To an object store the files are brought here, and each process may
    have an `aside` of its own.
    """
    if isinstance(path, RemotePath):
        return path.put_files(aside, names)
    return {name: identity(aside / name) for name in names}


def publish_shares(aside: Path, files: Mapping[str, tuple[int, str]], path: Place) -> None:
    """Make a directory appear as `path` whose files were all given to `put_share`; an `aside` elsewhere stays."""
    if isinstance(path, RemotePath):
        path.publish(files)
    else:
        publish_directory(aside, path)


def files_below(directory: Path) -> list[str]:
    """The names of all files below a directory, relative to it, in order."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def is_published(path: Place) -> bool:
    """Whether a directory was published there."""
    return path.is_published() if isinstance(path, RemotePath) else path.exists()


def local_directory(path: Place) -> Path:
    """A published directory on this node's disk: itself, or this node's copy of it.

    Raises:
        FileNotFoundError: it is in an object store, and not there or not whole.
        StorageError: the copy is not what was published.
    """
    return path.local_directory() if isinstance(path, RemotePath) else path


def local_file(path: Place) -> Path:
    """A file on this node's disk: itself, or this node's copy of it."""
    return path.local_file() if isinstance(path, RemotePath) else path


def workshop(path: Place) -> Path:
    """Where this node may prepare what will be published at or below `path`."""
    return working(path) if isinstance(path, RemotePath) else path


def rename(path: Place, name: str) -> None:
    """Give a file another name beside it."""
    if isinstance(path, RemotePath):
        path.replace(path.with_name(name))
    else:
        path.replace(path.with_name(name))


def remove_tree(path: Place) -> None:
    """Remove a directory with all that is in it, where there is one."""
    if isinstance(path, RemotePath):
        path.remove_tree()
        path = working(path)
    remove_directory(path)


def entries(directory: Place, pattern: str) -> list[Place]:
    """What lies directly in a directory and whose name fits, in the order of names."""
    return [directory / name for name in sorted(path.name for path in directory.glob(pattern))]


def dataset_of(files: Sequence[Place]) -> dict[str, Any]:
    """Files of one directory as arguments of `pyarrow.dataset.dataset`."""
    opened = [file.filesystem() if isinstance(file, RemotePath) else (None, str(file)) for file in files]
    return {"source": [path for _, path in opened], "filesystem": opened[0][0] if opened else None}


def readable(path: Place) -> Any:
    """What pyarrow reads a file from: a path, or an object's content."""
    if not isinstance(path, RemotePath):
        return path
    import pyarrow as pa

    return pa.BufferReader(path.read_bytes())


def mirror(local: Path, path: Place) -> None:
    """Have an object store hold what is in a directory of this node, links left out. Somebody else is writing there, so
    that files may go meanwhile."""
    if not isinstance(path, RemotePath):
        return
    for name in files_below(local):
        if (local / name).is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError):
            content = (local / name).read_bytes()
            (path / name).put(content)


class Lines:
    """A file of lines to which one process adds.

    Nothing can be added to an object: there lines are gathered on this node, and `publish` puts all of them anew.
    """

    def __init__(self, path: Place) -> None:
        self._path = path
        self._local = workshop(path)
        self._begun = False

    def add(self, line: str) -> None:
        """Add a line, given without its end."""
        if not self._begun:
            self._begun = True
            self._local.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(self._path, RemotePath):
                self._local.write_bytes(self._path.read_bytes() if self._path.is_file() else b"")
        with self._local.open("a") as file:
            file.write(line + "\n")

    def publish(self) -> None:
        """See to it that every line so far is where it belongs."""
        if isinstance(self._path, RemotePath) and self._begun:
            self._path.put_file(self._local)


def remove_asides(directory: Place) -> None:
    """Remove what a killed process was writing below `directory`; for the one who holds its lock."""
    if isinstance(directory, RemotePath):
        return  # what was put there has its final name
    for path in asides(directory):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: Place) -> Iterator[None]:
    """Turn "disk full" and "may not write" into a `StorageError` that says what to do.

    Libraries that write files in their own way (safetensors, torch) fail with exceptions of their own, of which none
    is for a full disk alone: with one of them, a file system that has no room left is taken for the reason.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        local = workshop(path)
        number = error.errno if isinstance(error, OSError) else None
        if number in _SPACE or (number is None and _room(local) < _FULL_BYTES):
            reason = os.strerror(number or errno.ENOSPC)
            mend = f"Free space there ({_room(local) / 2**30:.1f} GiB are free), then run the same command"
        elif number in _RIGHTS and _concerns(error, local):
            reason = os.strerror(number)
            mend = "Make it writable for this user, or choose another run.dir, then run the same command"
        else:
            raise
        raise StorageError(f"cannot write {local}: {reason}. {mend}; what is finished stays.") from error


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


def file_digest(path: Place) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    if isinstance(path, RemotePath):
        return path.sha256()
    return sha256(path)
