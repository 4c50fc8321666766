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
from dataclasses import dataclass
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
LOOK_S = 2.0
"""Between two looks at the heartbeat of another host's lock."""


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
        """Take the lock and keep it alive; waits up to `STALE_S` for a sign of life of a holder on another host.

        Raises:
            RunError: another driver holds it, and lives.
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
    host), which is waited for. The heartbeat is the file's modification time, set by the file server, so that clocks
    need not agree.
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
        holder = wait_until_stale(self._path.parent, self._sight)
        if holder is None:
            return
        # Of those that found it stale one removes it, and only it: a new lock may be there by now.
        claim = self._path.with_name(f"{self._path.name}.{holder.get('token')}")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            self._forget_abandoned(claim)
            return
        try:
            if self._read(self._path).get("token") == holder.get("token"):
                self._path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)

    def _forget_abandoned(self, claim: Path) -> None:
        """Of a driver that was killed in the moment it had it."""
        with contextlib.suppress(FileNotFoundError):
            if self._now() - claim.stat().st_mtime > STALE_S:
                claim.unlink()

    def _now(self) -> float:
        """The time by the file server's clock."""
        probe = aside_of(self._path)
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _sight(self) -> Sight | None:
        holder = self._read(self._path)
        try:
            beat = self._path.stat().st_mtime
        except FileNotFoundError:  # released meanwhile
            return None
        return Sight(holder, beat, self._now() - beat)

    def _touch(self) -> dict[str, Any] | None:
        holder = self._read(self._path)
        if holder.get("token") != self._token:
            return holder
        os.utime(self._path)
        return None


def me() -> dict[str, Any]:
    """What a lock says of its holder: this process."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "processes": _process_space(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _boot() -> str:
    """What this start of this machine's kernel is called: machines that were cloned may share a host name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _process_space() -> str:
    """Two containers may share a host name; process ids mean the same only within one process namespace. The first
    one of every machine has the same name."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def same_machine(holder: dict[str, Any]) -> bool:
    """Whether the holder's process id means something here."""
    here = (socket.gethostname(), _boot(), _process_space())
    return (holder.get("host"), holder.get("boot"), holder.get("processes")) == here


def gone(holder: dict[str, Any]) -> bool:
    """Whether the holder's process has ended; a later process may have its number."""
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["process_started"]) >= 1.0
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True, slots=True)
class Sight:
    """A lock as it was seen."""

    holder: dict[str, Any]
    beat: float
    """When its last heartbeat was, by the clock of what stores it."""
    age: float
    """Seconds since then, by the same clock."""


def wait_until_stale(run: Place, look: Callable[[], Sight | None]) -> dict[str, Any] | None:
    """The holder of a lock that may be taken over; None where the lock was given back.

    Whether a holder on this machine lives can be seen. One elsewhere has as long to show it as its heartbeat may stop.

    Args:
        look: sees the lock, or None where there is none any more.

    Raises:
        RunError: the holder lives.
    """
    first = None
    while (seen := look()) is not None:
        holder = seen.holder
        here = same_machine(holder)
        if gone(holder) if here else seen.age > STALE_S:
            return holder
        who = f"host {holder.get('host', '?')}, process {holder.get('pid', '?')}, since {holder.get('since', '?')}"
        if here or (first and (first.holder.get("token"), first.beat) != (holder.get("token"), seen.beat)):
            mend = f"Wait for it, or end it: kill {holder.get('pid')}" if here else "Wait for it, or end it there"
            raise RunError(f"{run} is in use by another driver: {who}. {mend}. Use another run.name for a second run.")
        if first is None:
            first = seen
            print(
                f"waiting: {run} was in use by another driver ({who}) {max(seen.age, 0):.0f} s ago. Without a sign of "
                f"life it is taken over in {max(STALE_S - seen.age, 1):.0f} s",
                file=sys.stderr,
                flush=True,
            )
        pause()
    return None


def pause() -> None:
    """Until the next look at another host's lock."""
    time.sleep(LOOK_S)


def busy(place: Place) -> str:
    """What a driver is told that lost a race for the lock at `place`."""
    return f"cannot take {place}: another driver took it at the same moment. Try again."
