"""At most one driver on a run directory in an object store.

Each driver that takes the run puts `lock-N.json`, N being one more than the highest there is, on condition that there
is none of that name: of two that try, one succeeds. Whoever has the highest number has the run. Its holder puts it
again every few seconds, which is its heartbeat, dated by the store's own clock, and at its end says in it that it is
released; it stays, so that numbers only grow. A stale one is not touched but outnumbered.

What that guarantees: S3, Google Cloud Storage and Azure put on condition, so no two drivers ever take the same number.
A store that cannot (fsspec then looks first and puts after) lets two in only when both put at the same moment, and the
one whose lock is not there `SETTLE_S` later is refused. A driver that was cut off for longer than `lock.STALE_S` while
another took its run over finds out at its next heartbeat, not before: what it puts until then can still arrive.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from evolve.errors import StorageError
from evolve.remote import RemotePath
from evolve.store import lock
from evolve.store.lock import DriverLock, Lock, stop_this_process
from evolve.store.run import RunDirectory, RunError

SETTLE_S = 1.0
PATTERN = "lock-*.json"


def driver_lock(run: RunDirectory) -> DriverLock:
    """The lock of a run directory, wherever that is."""
    return Lease(run.path) if isinstance(run.path, RemotePath) else Lock(run)


class Lease(DriverLock):
    """The lock of one driver on a run in an object store."""

    def __init__(self, run: RemotePath, on_lost: Callable[[str], None] = stop_this_process) -> None:
        super().__init__(run, on_lost)
        self._run = run
        self._mine: RemotePath | None = None
        self._content: dict[str, Any] = {}

    def _take(self) -> None:
        newest = self._newest()
        if newest is not None:
            lock.wait_until_stale(self._run, lambda: self._sight(newest))
        number = _number(newest) + 1 if newest is not None else 1
        self._place = self._mine = self._run / f"lock-{number:08}.json"
        self._content = {**lock.me(), "token": self._token}
        created = self._mine.create(json.dumps(self._content).encode())
        if created:
            time.sleep(SETTLE_S)
        if not created or self._holder(self._mine).get("token") != self._token:
            raise RunError(lock.busy(self._mine))
        for old in self._run.glob(PATTERN):
            if _number(old) < number:
                old.unlink(missing_ok=True)

    def _give_back(self) -> None:
        assert self._mine is not None
        with contextlib.suppress(StorageError):  # it is stale soon enough then
            if self._newest() == self._mine:
                self._mine.put(json.dumps({**self._content, "released": True}).encode())

    def _newest(self) -> RemotePath | None:
        return max(self._run.glob(PATTERN), key=_number, default=None)

    @staticmethod
    def _holder(path: RemotePath) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def _sight(self, newest: RemotePath) -> lock.Sight | None:
        holder = self._holder(newest)
        if not holder or holder.get("released"):
            return None
        probe = self._run / f"clock-{self._token}"
        probe.put(b"")
        try:
            beat = newest.modified()
            return lock.Sight(holder, beat, probe.modified() - beat)
        except FileNotFoundError:  # outnumbered meanwhile, and removed: the put on condition decides
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _touch(self) -> dict[str, Any] | None:
        assert self._mine is not None
        newest = self._newest()
        if newest != self._mine:
            return self._holder(newest) if newest is not None else {}
        self._mine.put(json.dumps(self._content).encode())
        return None


def _number(path: RemotePath) -> int:
    return int(path.name.removeprefix("lock-").removesuffix(".json"))
