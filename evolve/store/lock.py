"""At most one driver on a run directory: a lock file with a heartbeat, on any file system that all hosts share.

`evolve.store.lease` is the same for object stores.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from evolve.disk import aside_of
from evolve.errors import StorageError
from evolve.files import Place, storage_errors
from evolve.store.run import RunDirectory, RunError

BEAT_S = 10.0
STALE_S = 120.0
"""A lock of another host that was not touched for so long is its no more: that host is gone, or cut off."""


def stop_this_process(message: str) -> None:
    """End in good order, as on SIGTERM: another driver has the run now."""
    print(f"error: {message}", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


class DriverLock:
    """What the locks of all places share: a token, a heartbeat, and being told of its loss. May be released twice."""

    def __init__(self, place: Place, on_lost: Callable[[str], None]) -> None:
        """`on_lost` is called, with the reason, when another driver has taken the lock at `place` from this one."""
        self._place = place
        self._on_lost = on_lost
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock and keep it alive.

        Raises:
            RunError: another driver holds it.
            StorageError: the run directory cannot be written, or its store does not answer.
        """
        self._take()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
            self._give_back()

    def _take(self) -> None:
        raise NotImplementedError

    def _give_back(self) -> None:
        """Give back the lock, unless it is another's by now."""
        raise NotImplementedError

    def _touch(self) -> dict[str, Any] | None:
        """Show that this driver lives; None. Or, where the lock is its no more, who holds it, empty for nobody."""
        raise NotImplementedError

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                holder = self._touch()
            except (OSError, StorageError):  # a mount or store away for a moment; STALE_S is what it may take
                continue
            if holder is None:
                continue
            if not self._released.is_set():
                who = f"host {holder['host']}, process {holder['pid']}" if holder else "somebody who deleted it"
                self._on_lost(f"{self._place} was taken over by {who}: this driver was silent for too long. It stops.")
            return


class Lock(DriverLock):
    """The lock of one driver. It names its holder's host, process and start time.

    A lock is stale, and taken over, when its process is gone (same host), or when its heartbeat has stopped (another
    host). The heartbeat is the file's modification time, set by the file server, so that clocks need not agree.
    """

    def __init__(self, run: RunDirectory, on_lost: Callable[[str], None] = stop_this_process) -> None:
        assert isinstance(run.path, Path)
        self._path = run.path / "lock.json"
        super().__init__(self._path, on_lost)

    def _take(self) -> None:
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(3):
                if self._create():
                    return
                self._remove_if_stale()
        raise RunError(busy(self._path))

    def _give_back(self) -> None:
        if self._read(self._path).get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock file with its content in one step; False where there is one."""
        aside = aside_of(self._path)
        aside.write_text(json.dumps({**me(), "token": self._token}))
        try:
            os.link(aside, self._path)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def _remove_if_stale(self) -> None:
        holder = self._read(self._path)
        age = self._age()
        if age is None:  # released meanwhile
            return
        refuse_unless_stale(self._path.parent, holder, age)
        # Whoever renames it has it; should that be a new lock, taken since it was read, it is put back.
        aside = aside_of(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if self._read(aside).get("token") != holder.get("token"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _age(self) -> float | None:
        """Seconds since the last heartbeat, by the file server's clock; None when the lock is gone."""
        probe = aside_of(self._path)
        probe.touch()
        try:
            return probe.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink()

    def _touch(self) -> dict[str, Any] | None:
        holder = self._read(self._path)
        if not holder and not self._released.wait(1.0):  # one who looks at it may be putting it back
            holder = self._read(self._path)
        if holder.get("token") != self._token:
            return holder
        os.utime(self._path)
        return None


def me() -> dict[str, Any]:
    """What a lock says of its holder: this process."""
    return {
        "host": socket.gethostname(),
        "processes": _process_space(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _process_space() -> str:
    """Two containers may share a host name; process ids mean the same only within one process namespace."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def same_machine(holder: dict[str, Any]) -> bool:
    """Whether the holder's process id means something here."""
    return (holder.get("host"), holder.get("processes")) == (socket.gethostname(), _process_space())


def gone(holder: dict[str, Any]) -> bool:
    """Whether the holder's process has ended; a later process may have its number."""
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["process_started"]) >= 1.0
    except psutil.NoSuchProcess:
        return True


def refuse_unless_stale(run: Place, holder: dict[str, Any], age: float) -> None:
    """Raise `RunError` where a lock's holder lives. `age`: seconds since its last heartbeat."""
    if gone(holder) if same_machine(holder) else age > STALE_S:
        return
    who = f"host {holder.get('host', '?')}, process {holder.get('pid', '?')}, since {holder.get('since', '?')}"
    if same_machine(holder):
        mend = f"Wait for it, or end it: kill {holder.get('pid')}"
    else:
        mend = (
            f"Wait for it, or end it there. If that machine is gone, run this again in {max(STALE_S - age, 1):.0f} s: "
            f"its last sign of life is {max(age, 0):.0f} s old, and after {STALE_S:.0f} s its lock is taken over"
        )
    raise RunError(f"{run} is in use by another driver: {who}. {mend}. Use another run.name for a second run.")


def busy(place: Place) -> str:
    """What a driver is told that lost a race for the lock at `place`."""
    return f"cannot take {place}: another driver took it at the same moment. Try again."
