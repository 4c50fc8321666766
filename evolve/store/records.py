"""Records of an evaluation under way, for whoever continues it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from typing import Any

from evolve.files import Place, publish_file, storage_errors, workshop
from evolve.remote import RemotePath

Row = dict[str, Any]
"""One record; `problem_id` says whose."""

PUT_S = 30.0
"""Between two copies to an object store, to which nothing can be appended."""


class RecordFile:
    """JSON lines: first what the records depend on, then one record a line, appended as they come."""

    def __init__(self, path: Place, depends_on: str) -> None:
        """`depends_on`: a digest of everything that other records would have come from."""
        self._path, self._local = path, workshop(path)
        self._put = 0.0
        self._header = {"depends_on": depends_on}

    def open(self) -> dict[str, Row]:
        """The records that are there, by problem; the file is ready for more of them then.

        Records of something else are dropped, and so is what a killed process had not written to the end.
        """
        found = self._read()
        lines = [self._header, *found.values()]
        publish_file(self._local, lambda aside: aside.write_text("".join(map(_line, lines))))
        return found

    def append(self, rows: Iterable[Row]) -> None:
        """Make further records durable.

        Raises:
            StorageError: the disk is full, or may not be written to.
        """
        text = "".join(map(_line, rows))
        if text:
            with storage_errors(self._local), self._local.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if isinstance(self._path, RemotePath) and time.monotonic() > self._put + PUT_S:
                self._path.put_file(self._local)
                self._put = time.monotonic()

    def remove(self) -> None:
        """The evaluation is finished."""
        self._local.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Row]:
        found: dict[str, Row] = {}
        if not self._path.exists():
            return found
        for number, line in enumerate(self._path.read_bytes().decode(errors="replace").splitlines()):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if value != self._header:
                    break
            else:
                found[value["problem_id"]] = value
        return found


def _line(value: Row) -> str:
    return json.dumps(value) + "\n"
