"""An object store for tests: `objects:///directory/key`, kept as files below a directory, so that all processes of a
machine share it. It can do no more than an object store can: no renaming, no appending, no directory without objects.

With this directory on PYTHONPATH fsspec finds it, in every process, as it would find an installed one.

The file that `OBJECTS_KILL` names, while it exists, holds a pattern: whoever is about to put an object whose key fits
is killed, once. `OBJECTS_FAIL` is a pattern of keys that the store does not take. With `OBJECTS_AWAY` it answers
nothing. Which objects are fetched as files is noted in the file that `OBJECTS_LOG` names.
"""

from __future__ import annotations

import datetime
import fnmatch
import io
import os
import shutil
import signal
import uuid
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem

ASIDE = ".aside-"


class Objects(AbstractFileSystem):
    protocol = "objects"
    cachable = True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        _answer()
        path = self._strip_protocol(path)
        if Path(path).is_file():
            found = [self.info(path)]
        else:
            found = [self._describe(entry) for entry in _children(Path(path))]
            if not found:
                raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        _answer()
        path = Path(self._strip_protocol(path))
        if not path.is_file() and not _children(path):
            raise FileNotFoundError(str(path))
        return self._describe(path)

    @staticmethod
    def _describe(path: Path) -> dict[str, Any]:
        if path.is_dir():
            return {"name": str(path), "size": 0, "type": "directory"}
        stat = path.stat()
        return {"name": str(path), "size": stat.st_size, "type": "file", "etag": f"{stat.st_ino}-{stat.st_mtime_ns}"}

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(Path(self._strip_protocol(path)).stat().st_mtime, datetime.UTC)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        key = self._strip_protocol(path)
        return Path(key).open("rb") if mode == "rb" else _Writer(self, key, mode)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._put(self._strip_protocol(path), lambda aside: aside.write_bytes(value), new=mode == "create")

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any) -> None:
        if Path(lpath).is_dir():
            return
        self._put(self._strip_protocol(rpath), lambda aside: shutil.copyfile(lpath, aside), new=mode == "create")

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **kwargs: Any) -> None:
        shutil.copyfile(self._strip_protocol(rpath), lpath)
        if log := os.environ.get("OBJECTS_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{rpath}\n")

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._put(self._strip_protocol(path2), lambda aside: shutil.copyfile(self._strip_protocol(path1), aside))

    def rm_file(self, path: str) -> None:
        Path(self._strip_protocol(path)).unlink()

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for key in [path] if not recursive else self.find(path):
            self.rm_file(key)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    @staticmethod
    def _put(key: str, write: Any, new: bool = False) -> None:
        target = Path(key)
        _kill_as_told(target)
        if fnmatch.fnmatch(key, os.environ.get("OBJECTS_FAIL", "")):
            raise PermissionError(f"{key}: the store takes nothing")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{ASIDE}{uuid.uuid4().hex}")
        write(aside)
        try:
            if new:
                os.link(aside, target)
            else:
                aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)


class _Writer(io.BytesIO):
    """An object that is put when it is closed."""

    def __init__(self, store: Objects, key: str, mode: str) -> None:
        if mode != "wb":
            raise NotImplementedError(f"{mode}: objects are put whole")
        super().__init__()
        self._store, self._key = store, key

    def close(self) -> None:
        if not self.closed:
            self._store.pipe_file(self._key, self.getvalue())
        super().close()


def _children(path: Path) -> list[Path]:
    """Objects below a prefix, and prefixes that have any."""
    if not path.is_dir():
        return []
    own = [entry for entry in path.iterdir() if not entry.name.startswith(ASIDE)]
    return sorted(entry for entry in own if entry.is_file() or _children(entry))


def _answer() -> None:
    if os.environ.get("OBJECTS_AWAY"):
        raise ConnectionError("the store is away")


def _kill_as_told(target: Path) -> None:
    order = Path(os.environ.get("OBJECTS_KILL", "/nowhere"))
    if order.exists() and fnmatch.fnmatch(str(target), order.read_text()):
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
