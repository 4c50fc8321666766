"""Paths in an object store (`s3://bucket/runs`), through fsspec, and what a node keeps of them on its own disk.

An object store has no renames, no directories and no appending. What it has, and all that is used of it here:

- An object appears whole or not at all; another put replaces it whole. A file is one object.
- A directory is the objects below one prefix, and `published.json`, put last, which names each of them with its size
  and SHA-256. Without it there is no such directory; with an object that is not as it says, the directory is damaged.
- An object can be put on condition that there is none yet. S3, Google Cloud and Azure decide that themselves.

What must be a directory on a disk (checkpoints, for vLLM, transformers and DeepSpeed) is copied to this node once, into
`EVOLVE_CACHE/directories` under the digest of its `published.json`, and checked against it. Nothing there is needed
again once no run is at work: the store has everything.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from evolve.disk import aside_of, remove_directory, settle_directory, settle_file, sha256
from evolve.errors import StorageError

INDEX = "published.json"
CACHE = "EVOLVE_CACHE"
"""Environment variable of a node: the directory for its copies; else `~/.cache/evolve`."""
_URI = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SECRET = re.compile(r"://[^/]*:[^/]*@|\?")
_CHUNK = 1 << 22


def is_uri(text: str) -> bool:
    """Whether `text` names something in an object store."""
    return _URI.match(text) is not None and not text.startswith("file://")


def holds_secret(uri: str) -> bool:
    """Whether a URI carries a password or parameters; it would be shown, and saved with the run."""
    return is_uri(uri) and _SECRET.search(uri) is not None


class Damaged(StorageError):
    """What an object store has is not what was put there."""


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """An object, or all objects below a prefix; named and asked like a `pathlib.Path`.

    It is no `os.PathLike`: whoever wants a file on a disk must say so (`local_directory`, `read_bytes`). All that asks
    the store raises `StorageError` when it does not answer, so that silence is never taken for absence.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def absolute(self) -> RemotePath:
        return self

    def resolve(self) -> RemotePath:
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: objects need no directory."""

    # ------------------------------------------------------------------ asking

    def exists(self) -> bool:
        """Whether there is such an object, or any below it."""
        with self._asking() as (fs, path):
            try:
                fs.info(path)
            except FileNotFoundError:
                return False
            return True

    def is_file(self) -> bool:
        """Whether there is such an object."""
        with self._asking() as (fs, path):
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError:
                return False

    def glob(self, pattern: str) -> list[RemotePath]:
        """What lies directly below and whose name fits, in the order of names."""
        return [self / name for name in sorted(self._sizes()) if fnmatch.fnmatchcase(name, pattern)]

    def _sizes(self) -> dict[str, int]:
        """Size in bytes by name of what lies directly below."""
        with self._asking() as (fs, path):
            try:
                found = fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        names = {entry["name"].rstrip("/"): int(entry.get("size") or 0) for entry in found}
        return {name.rpartition("/")[2]: size for name, size in names.items() if name != path.rstrip("/")}

    def read_bytes(self) -> bytes:
        """The object's content.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking() as (fs, path):
            content: bytes = fs.cat_file(path)
            return content

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def modified(self) -> float:
        """When the object was put, by the store's own clock, in seconds since 1970.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking() as (fs, path):
            return float(fs.modified(path).timestamp())

    def sha256(self) -> str:
        """SHA-256 of the object's content, as hexadecimal digits; asked once of each version of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking() as (fs, path):
            version = str(fs.ukey(path))
            if _digests.get(self.uri, ("", ""))[0] != version:
                total = hashlib.sha256()
                with fs.open(path, "rb", cache_type="none", block_size=_CHUNK) as file:
                    while chunk := file.read(_CHUNK):
                        total.update(chunk)
                _digests[self.uri] = (version, total.hexdigest())
            return _digests[self.uri][1]

    def filesystem(self) -> tuple[Any, str]:
        """fsspec's file system, and this path in it."""
        with self._asking() as found:
            return found

    def local_file(self) -> Path:
        """A copy of the object on this node's disk; asked for twice it is made once.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking() as (fs, path):
            version = hashlib.sha256(f"{self.uri} {fs.ukey(path)}".encode()).hexdigest()
            target = cache_root() / "files" / version
            with _alone(target):
                if not target.exists():
                    settle_file(target, lambda aside: fs.get_file(path, str(aside)))
        return target

    # ------------------------------------------------------------------ changing

    def put(self, content: bytes) -> None:
        """Put an object; what was there is replaced."""
        with self._asking(putting=True) as (fs, path):
            fs.pipe_file(path, content)

    def create(self, content: bytes) -> bool:
        """Put an object where there is none; false, and nothing changed, where there is one."""
        with self._asking(putting=True) as (fs, path):
            try:
                fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

    def put_file(self, local: Path) -> None:
        """Put a file's content as this object."""
        with self._asking(putting=True) as (fs, path):
            fs.put_file(str(local), path)
            _digests[self.uri] = (str(fs.ukey(path)), sha256(local))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object.

        Raises:
            FileNotFoundError: there is none, and that is not `missing_ok`.
        """
        with self._asking() as (fs, path):
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def replace(self, target: RemotePath) -> None:
        """Copy an object, then remove it; both exist for a moment."""
        with self._asking() as (fs, path):
            fs.cp_file(path, target.filesystem()[1])
            fs.rm_file(path)

    def remove_tree(self) -> None:
        """Remove everything below, what makes it a directory first."""
        (self / INDEX).unlink(missing_ok=True)
        with self._asking() as (fs, path), contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    # ------------------------------------------------------------------ directories

    def is_published(self) -> bool:
        """Whether this is a whole directory."""
        return (self / INDEX).is_file()

    def published(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file of a directory, by its name relative to it.

        Raises:
            FileNotFoundError: there is no such directory, or an object of it is missing or has another size.
        """
        try:
            index = json.loads((self / INDEX).read_bytes())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: no such directory, or not all of it was uploaded") from error
        except ValueError as error:
            raise FileNotFoundError(f"{self / INDEX} is not readable ({error})") from error
        files = {name: (int(size), str(digest)) for name, (size, digest) in index.items()}
        with self._asking() as (fs, path):
            below = fs.find(path, detail=True).items()
        found = {name[len(path.rstrip("/")) + 1 :]: int(entry["size"]) for name, entry in below}
        for name, (size, _) in files.items():
            if found.get(name) != size:
                raise FileNotFoundError(f"{self / name} has {found.get(name, 'no')} bytes where {size} were put")
        return files

    def withdraw(self) -> None:
        """Have a directory count as absent while its files are put."""
        (self / INDEX).unlink(missing_ok=True)

    def put_files(self, local: Path, names: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Put files of `local` below this; their sizes and SHA-256. They count once `publish` names them."""
        with self._asking(putting=True) as (fs, path):
            fs.put([str(local / name) for name in names], [f"{path}/{name}" for name in names])
        return {name: identity(local / name) for name in names}

    def publish(self, files: Mapping[str, tuple[int, str]]) -> None:
        """Make a directory of the files that were put, all of which are given."""
        (self / INDEX).put(_index(files))

    def local_directory(self) -> Path:
        """A copy of a directory on this node's disk, checked when it was made; asked for twice it is made once.

        Raises:
            FileNotFoundError: there is no such directory, or it is not whole.
            Damaged: the store has something else than was published.
        """
        files = self.published()
        target = _copy_of(files)
        with _alone(target):
            if all((target / name).is_file() and (target / name).stat().st_size == files[name][0] for name in files):
                return target
            aside = aside_of(target)
            try:
                for name in files:
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                with self._asking() as (fs, path):
                    fs.get([f"{path}/{name}" for name in files], [str(aside / name) for name in files])
                for name, expected in files.items():
                    if identity(aside / name) != expected:
                        raise Damaged(f"{self / name} is not what was published there: it is damaged")
                _settle(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return target

    def adopt(self, local: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """Keep `local`, whose files were published here, as this node's copy; it is moved."""
        target = _copy_of(files)
        with _alone(target):
            _settle(local, target)

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _asking(self, putting: bool = False) -> Iterator[tuple[Any, str]]:
        """fsspec's file system and this path in it; whatever goes wrong becomes a `StorageError`, but for absence.

        When something is put, what is absent is the bucket.
        """
        try:
            from fsspec.core import url_to_fs

            # What others put must be seen: nothing about listings is kept.
            yield url_to_fs(self.uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # no such library, no such protocol
            raise StorageError(f"{self}: {error}") from error
        except Exception as error:  # each store's library has errors of its own
            if isinstance(error, StorageError) or (isinstance(error, FileNotFoundError) and not putting):
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            raise StorageError(
                f"{self}: the store does not do what it is asked ({type(error).__name__}: {reason}). Check the "
                f"address, this node's credentials and its network with `python -m evolve.doctor`, then run the same "
                f"command; what is finished stays."
            ) from error


_digests: dict[str, tuple[str, str]] = {}
"""Version and SHA-256 of objects that this process has read or put."""


def cache_root() -> Path:
    """Where this node keeps copies of what is in an object store, and prepares what is to be put there."""
    given = os.environ.get(CACHE)
    return Path(given).absolute() if given else Path.home() / ".cache" / "evolve"


def working(path: RemotePath) -> Path:
    """A place on this node's disk for what is to be put at `path`; its parent exists."""
    place = cache_root() / "working" / hashlib.sha256(str(path).encode()).hexdigest()[:16] / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _index(files: Mapping[str, tuple[int, str]]) -> bytes:
    return json.dumps(dict(sorted(files.items())), indent=1).encode()


def identity(file: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    return file.stat().st_size, sha256(file)


def _copy_of(files: Mapping[str, tuple[int, str]]) -> Path:
    return cache_root() / "directories" / hashlib.sha256(_index(files)).hexdigest()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process of this node at a time; the kernel lets go of the lock of one that dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _settle(aside: Path, target: Path) -> None:
    """Make a whole directory this node's copy, durably, in place of one that is not whole."""
    remove_directory(target)
    settle_directory(aside, target)
