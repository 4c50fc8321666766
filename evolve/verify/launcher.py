"""First program inside the sandbox: gives up privileges, sets limits, enters Landlock, becomes the zygote.

Runs in its own short-lived interpreter so that none of this is mapped in the processes forked later.
Usage: launcher.py JSON, with keys: kind, fd, uid (or null), landlock (paths to read, or null), paths, limits.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import resource
import sys


def drop_privileges(uid: int) -> None:
    """Become `uid` for good, with no supplementary groups. Capabilities go with uid 0."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def enter_landlock(readable: list[str]) -> None:
    """Restrict this process and all that follow to reading `readable` and writing /dev/null."""
    # py-landlock looks libc up with tools (ldconfig, gcc) that are not in here.
    ctypes.util.find_library = lambda name: "libc.so.6" if name == "c" else None
    from py_landlock import AccessFs, Landlock

    rules = Landlock(strict=False)
    rules.allow_read(*readable)
    rules.allow_execute(*readable)
    rules.add_path_rule("/dev/null", access=AccessFs.READ_FILE | AccessFs.WRITE_FILE)
    rules.apply()


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path.extend(settings["paths"])
    os.umask(0o077)
    if settings["uid"] is not None:
        drop_privileges(settings["uid"])
    for name, value in settings["limits"].items():
        which = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    # Only where there is no pid namespace does this matter; elsewhere all falls with its first process.
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if settings["landlock"] is not None:
        enter_landlock(settings["landlock"])
    if settings["kind"] == "probe":
        os.execv(sys.executable, [sys.executable, "-s", "-S", "-P", "-B", "-c", "import math, socket"])
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    boot = (
        f"import sys; sys.path += {settings['paths'] + [here]!r}; import zygote;"
        f"zygote.main({settings['kind']!r}, {settings['fd']}, {here!r})"
    )
    os.set_inheritable(settings["fd"], True)
    os.execv(sys.executable, [sys.executable, "-s", "-S", "-P", "-B", "-c", boot])


if __name__ == "__main__":
    main()
