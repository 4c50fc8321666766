"""Problems nobody has seen, and what this kernel tells of deaths."""

import contextlib
import os
import subprocess
from collections.abc import Callable

import psutil

from evolve.types import Problem
from evolve.verify.deaths import exit_status
from evolve.verify.server import make_channel, pass_pidfds, receive

_count = iter(range(10**9))


def problem() -> Problem:
    """A problem nobody has seen, so that nothing is remembered of it."""
    return Problem(f"p{next(_count)}", "q", ("7",))


def sandboxed() -> dict[int, str]:
    """The processes below this one's supervisors, with their status as psutil calls it."""
    found = {}
    for supervisor in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "evolve.verify.supervisor" in " ".join(supervisor.cmdline()):
                for process in supervisor.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found[process.pid] = process.status()
    return found


def exit_status_is_known() -> bool:
    """Whether this kernel tells what a process died of that is no child (Linux 6.15)."""
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
        process.wait()
    try:
        return exit_status(pidfd) == 0
    finally:
        os.close(pidfd)


def dead_sender(end: Callable[[], object]) -> int:
    """The pidfd, as it came with its greeting, of a process that ended itself and was gone before that was read."""
    ours, theirs = make_channel()
    pass_pidfds(ours, True)
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            theirs.send(b"H")
            end()
            os._exit(0)
        os.waitpid(pid, 0)
        packet = receive(ours)
    assert (packet.data, packet.pid) == (b"H", pid)
    return packet.pidfd


def early_deaths_are_known() -> bool:
    """Whether this kernel tells what a process died of that was gone before its greeting was read (Linux 6.17)."""
    pidfd = dead_sender(lambda: os._exit(3))
    if pidfd < 0:
        return False
    try:
        return exit_status(pidfd) == 3 << 8
    finally:
        os.close(pidfd)
