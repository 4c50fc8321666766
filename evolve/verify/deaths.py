"""What a process died of, asked of its pidfd: it is no child of the supervisor, which so cannot wait for it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
from typing import NamedTuple

_GET_INFO = 0xC040FF0B
"""PIDFD_GET_INFO for the first version of `struct pidfd_info`, 64 bytes."""
_INFO = struct.Struct("QQ11Ii")
"""Mask, cgroup, eleven process and user ids, exit status as of wait(2)."""
_EXIT = 1 << 3
"""PIDFD_INFO_EXIT."""

FOR_MEMORY = "the kernel killed the interpreter for the memory it used"


class Death(NamedTuple):
    """What a node is said to have died of."""

    status: str
    """A verdict's status; `infrastructure`: nothing says that it was the code's doing."""
    message: str
    certain: bool
    """Whether it was the code's doing for sure; if not, its step is tried again."""


def exit_status(pidfd: int) -> int | None:
    """A dead process's status as wait(2) gives it; None where the kernel (before Linux 6.15) does not say."""
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _EXIT, *[0] * 13)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(info)
    return status if mask & _EXIT else None


def await_end(pidfd: int, patience_s: float) -> None:
    """Wait until a process that is dying is no more, where the kernel says so of a pidfd (Linux 6.9)."""
    poll = select.poll()
    poll.register(pidfd, 0)
    poll.poll(1000 * patience_s)


def cause_of_death(pidfd: int, for_memory: bool | None) -> Death:
    """Of what a node died without the supervisor's doing.

    `for_memory`: whether the kernel says that it killed a process of the node's control group for memory; None: it
    does not say. SIGKILL is otherwise the machine's doing, as when its memory ran out, or that of a server's end.
    SIGXCPU: the limit in the kernel, behind the one that the supervisor enforces.
    """
    status = exit_status(pidfd) if pidfd >= 0 else None
    killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if for_memory and (killed or status is None):
        return Death("oom", FOR_MEMORY, True)
    if killed:
        return Death("infrastructure", "the interpreter was killed from outside the sandbox", False)
    if status is None:
        return Death("crash", "the interpreter died of the code", False)
    if not os.WIFSIGNALED(status):
        code = os.waitstatus_to_exitcode(status)
        return Death("crash", f"the code ended the interpreter with exit status {code}", True)
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return Death("timeout", "the kernel killed the interpreter for the CPU time it used", True)
    return Death("crash", f"the interpreter died of the code ({signal.strsignal(number) or number})", True)
