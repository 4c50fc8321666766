"""What a process died of, asked of its pidfd: it is no child of the supervisor, which so cannot wait for it."""

from __future__ import annotations

import fcntl
import os
import signal
import struct

_GET_INFO = 0xC040FF0B
"""PIDFD_GET_INFO for the first version of `struct pidfd_info`, 64 bytes."""
_INFO = struct.Struct("QQ11Ii")
"""Mask, cgroup, eleven process and user ids, exit status as of wait(2)."""
_EXIT = 1 << 3
"""PIDFD_INFO_EXIT."""


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


def cause_of_death(pidfd: int, for_memory: bool | None) -> tuple[str, str]:
    """Status and message for a node that died without the supervisor's doing.

    `for_memory`: whether the kernel says that it killed a process of the node's control group for memory; None: it
    does not say. SIGKILL is then taken to be that: inside the sandbox no system call sends it to others.
    SIGXCPU: the limit in the kernel, behind the one that the supervisor enforces.
    """
    status = exit_status(pidfd) if pidfd >= 0 else None
    killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if (killed and for_memory is not False) or (status is None and for_memory):
        return "oom", "the kernel killed the interpreter for the memory it used"
    if status is None:
        return "crash", "the interpreter died of the code"
    if not os.WIFSIGNALED(status):
        return "crash", f"the code ended the interpreter with exit status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "the kernel killed the interpreter for the CPU time it used"
    return "crash", f"the interpreter died of the code ({signal.strsignal(number) or number})"
