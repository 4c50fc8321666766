"""A memory control group around each interpreter server, where the machine lets this user make one.

Limits of resources bind single processes; the group binds all nodes of a server together, so that they
cannot take the machine's memory from the engines beside them. Both versions of the interface are known.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_LIMITS = ("memory.max", "memory.limit_in_bytes")
"""The file that holds the limit: of version 2, of version 1."""
_NAME = "evolve-sandbox"

MISSING = (
    "memory control group: this user may make none here, so that memory is limited by process only"
    " (`systemd-run --user --scope -p Delegate=yes COMMAND` gives one)"
)


def _candidates() -> Iterator[Path]:
    """Groups in which one for a server might be made, nearest first."""
    for line in _OWN.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if "memory" in controllers.split(","):
            yield from (_ROOT / controllers / inside, _ROOT / controllers)
        elif not controllers:
            # A group that has processes itself, as this one's own has, hands no controllers down.
            for group in (_ROOT / inside, *(_ROOT / inside).parents):
                delegated = group / "cgroup.subtree_control"
                if delegated.is_file() and "memory" in delegated.read_text().split():
                    yield group
                if group == _ROOT:
                    break


def find() -> Path | None:
    """Where groups can be made, limited, entered and removed again by this user; None: nowhere."""
    for parent in _candidates():
        try:
            group = make(parent, "probe", 1 << 30)
        except OSError:
            continue
        try:
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
                (group / "cgroup.procs").write_text(str(process.pid))
        except OSError:
            continue
        finally:
            remove(group, 1.0)
        return parent
    return None


def make(parent: Path, name: str, limit: int) -> Path:
    """A new group of at most `limit` bytes.

    Raises:
        OSError: this user may not.
    """
    clear(parent, 0.0)
    group = parent / f"{_NAME}-{os.getpid()}-{name}"
    group.mkdir(exist_ok=True)
    file = next((group / name for name in _LIMITS if (group / name).exists()), None)
    if file is None:
        group.rmdir()
        raise FileNotFoundError(f"{parent} hands no memory controller down")
    file.write_text(str(limit))
    return group


def entering(group: Path, command: list[str]) -> list[str]:
    """`command`, started inside `group`: by a shell that enters it and becomes the command."""
    return ["/bin/sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(group), *command]


def oom_kills(group: Path) -> int | None:
    """How many processes of a group the kernel has killed for memory so far; None where it does not count."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            lines = (group / name).read_text().splitlines()
        except OSError:
            continue
        counts = dict(line.split() for line in lines)
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return None


def remove(group: Path, patience_s: float) -> None:
    """Remove a group whose processes are dead or dying; what does not empty in time is left to `clear`."""
    deadline = time.monotonic() + patience_s
    while group.is_dir():
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return
            time.sleep(0.002)


def clear(parent: Path, patience_s: float) -> None:
    """Remove the groups in `parent` whose makers are no more."""
    for group in parent.glob(f"{_NAME}-*"):
        maker = group.name.removeprefix(f"{_NAME}-").partition("-")[0]
        if not Path("/proc", maker).exists():
            remove(group, patience_s)
