"""The system calls a sandboxed interpreter may make, compiled to a BPF program.

Everything not listed fails with EPERM. `fork` (glibc's `clone` with exactly its flags) is reported to the
supervisor, which lets the forks it has commanded through and refuses all others; so is the limit of CPU time, which
only the harness sets, once. What siblings would share, such as pipes and memory, cannot be made: they are forked from
one process, and must not hear of each other.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource

FORK_FLAGS = 0x1200011
"""CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD: what glibc's fork() passes to clone."""

ALLOWED = [
    "read",
    "write",
    "readv",
    "writev",
    "pread64",
    "close",
    "fstat",
    "stat",
    "lstat",
    "newfstatat",
    "statx",
    "lseek",
    "mprotect",
    "munmap",
    "mremap",
    "madvise",
    "brk",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "openat",
    "open",
    "readlink",
    "readlinkat",
    "access",
    "faccessat",
    "faccessat2",
    "getcwd",
    "chdir",
    "getdents64",
    "dup",
    "dup2",
    "dup3",
    "poll",
    "ppoll",
    "select",
    "pselect6",
    "futex",
    "set_robust_list",
    "get_robust_list",
    "rseq",
    "set_tid_address",
    "getpid",
    "getppid",
    "gettid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getresuid",
    "getresgid",
    "getgroups",
    "getpgrp",
    "getpgid",
    "getsid",
    "gettimeofday",
    "time",
    "clock_gettime",
    "clock_getres",
    "clock_nanosleep",
    "nanosleep",
    "getrandom",
    "uname",
    "sysinfo",
    "getrusage",
    "times",
    "getrlimit",
    "sched_getaffinity",
    "sched_yield",
    "getcpu",
    "exit",
    "exit_group",
    "wait4",
    "waitid",
    "alarm",
    "setitimer",
    "getitimer",
    "pause",
    "rt_sigtimedwait",
    "rt_sigsuspend",
    "restart_syscall",
    "arch_prctl",
    "sendmsg",
    "sendto",
    "recvmsg",
    "recvfrom",
    "getsockopt",
    "getsockname",
    "fadvise64",
    "statfs",
    "fstatfs",
    "umask",
    "membarrier",
]

IOCTLS = (0x5401, 0x541B, 0x5451)
"""TCGETS, FIONREAD, FIOCLEX."""

FCNTLS = (0, 1, 2, 3, 1030, 1032, 1034)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS. By F_SETOWN and F_SETSIG a node could
have the kernel send any signal to any other; F_SETFL would change what all nodes share, such as /dev/null."""

PR_SET_NAME = 15


def compile_filter() -> bytes:
    """The filter as an array of `struct sock_filter`, for this machine's architecture.

    Raises:
        RuntimeError: libseccomp is missing or too old.
    """
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    arch = seccomp.system_arch()
    for name in ALLOWED:
        if seccomp.resolve_syscall(arch, name) >= 0:
            rules.add_rule(seccomp.ALLOW, name)
    for request in IOCTLS:
        rules.add_rule(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, request))
    # Memory that is shared would be shared between siblings. Native code, which Python's mmap maps so, stays possible,
    # but the supervisor is told, and keeps no such state.
    shared = seccomp.Arg(3, seccomp.MASKED_EQ, mmap.MAP_SHARED, mmap.MAP_SHARED)
    rules.add_rule(seccomp.ALLOW, "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, mmap.MAP_SHARED, 0))
    rules.add_rule(seccomp.NOTIFY, "mmap", shared, seccomp.Arg(2, seccomp.MASKED_EQ, mmap.PROT_EXEC, mmap.PROT_EXEC))
    for command in FCNTLS:
        rules.add_rule(seccomp.ALLOW, "fcntl", seccomp.Arg(1, seccomp.EQ, command))
    # Limits can be read. Those that code set would have its steps die as if the machine had killed them.
    itself = seccomp.Arg(0, seccomp.EQ, 0)
    rules.add_rule(seccomp.ALLOW, "prlimit64", itself, seccomp.Arg(2, seccomp.EQ, 0))
    cpu = seccomp.Arg(1, seccomp.EQ, resource.RLIMIT_CPU)
    rules.add_rule(seccomp.NOTIFY, "prlimit64", itself, cpu, seccomp.Arg(2, seccomp.NE, 0))
    rules.add_rule(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.EQ, PR_SET_NAME))
    rules.add_rule(seccomp.NOTIFY, "clone", seccomp.Arg(0, seccomp.EQ, FORK_FLAGS))
    # ENOSYS, not EPERM: glibc then falls back to clone, whose flags can be checked.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with os.fdopen(fd, "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def syscall_number(name: str) -> int:
    """The number of a system call on this machine."""
    import pyseccomp as seccomp

    return int(seccomp.resolve_syscall(seccomp.system_arch(), name))
