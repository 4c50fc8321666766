"""One interpreter server (zygote) as its supervisor sees it: start, handshake, fork gate, death."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import NamedTuple

from evolve.verify import cgroups, layers
from evolve.verify.layers import Layers
from evolve.verify.seccomp import compile_filter, syscall_number

FRAME = 1 << 18
"""Longest packet on a channel, bytes."""

STRIKES = 10
"""Refused calls after which a process is killed."""

_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size) + 2 * socket.CMSG_SPACE(4)
_PASS_PIDFD, _SCM_PIDFD = 76, 4
"""SO_PASSPIDFD and the kind of the message it makes, which Python does not name."""
_buffer = bytearray(FRAME)
_view = memoryview(_buffer)

_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101
_NOTIF_HEAD, _NOTIF_RESPONSE = struct.Struct("QIIi"), struct.Struct("QqiI")
_NOTIF_CONTINUE = 1


class ProtocolError(Exception):
    """A packet that nothing honest sends."""


class Packet(NamedTuple):
    """What came over a channel, with what the kernel attests."""

    data: bytes
    """Empty: the other end is closed."""
    pid: int
    """Its sender's process id."""
    pidfd: int
    """Its sender's pidfd, the receiver's to close; -1: not asked for, or not to be had."""
    descriptors: list[int]
    """Descriptors the sender passed, the receiver's to close."""


def receive(channel: socket.socket) -> Packet:
    """The next packet.

    Raises:
        BlockingIOError: nothing is there.
        ProtocolError: the packet is too long.
    """
    size, ancillary, flags, _ = channel.recvmsg_into([_view], _ANCILLARY)
    pid, pidfd, descriptors = 0, -1, []
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
        elif kind == _SCM_PIDFD:
            pidfd = max(-1, int.from_bytes(data[:4], sys.byteorder, signed=True))
        elif kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % 4])
            descriptors += list(received)
    if flags & socket.MSG_TRUNC:
        for descriptor in (*descriptors, *([pidfd] if pidfd >= 0 else [])):
            os.close(descriptor)
        raise ProtocolError("a packet was longer than the limit")
    return Packet(bytes(_view[:size]), pid, pidfd, descriptors)


def make_channel() -> tuple[socket.socket, socket.socket]:
    """A socket pair whose first end is non-blocking and is told who sent each packet. Either sends `FRAME` bytes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        # The kernel doubles what is asked for, so that what net.core.wmem_max lets anybody have by default is enough.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FRAME)
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def pass_pidfds(channel: socket.socket, wanted: bool) -> None:
    """Whether packets come with their sender's pidfd (Linux 6.5; from 6.17 also that of a sender long dead).

    Its process id may be another's by the time it is read; this cannot be.
    """
    with contextlib.suppress(OSError):
        channel.setsockopt(socket.SOL_SOCKET, _PASS_PIDFD, int(wanted))


class ServerState(Enum):
    """How far a server is on its way."""

    WARMING = 1
    LOCKING = 2
    READY = 3
    DEAD = 4


@dataclass
class ServerSettings:
    """What all servers of a supervisor have in common."""

    layers: Layers
    memory_mb: int
    group_mb: int
    """Memory of all processes of one server together, where there are control groups."""
    cpu_s: int
    """Backstop in the kernel, seconds of CPU of one process; above every limit that is enforced from outside."""
    output_bytes: int


@dataclass
class Server:
    """A zygote in its sandbox. `channel` and `listener` are to be polled by the owner."""

    kind: str
    settings: ServerSettings
    state: ServerState = ServerState.DEAD
    pid: int = 0
    channel: socket.socket | None = None
    listener: int = -1
    permits: dict[int, int] = field(default_factory=dict)
    """Forks commanded and not yet made, by process id."""
    strikes: dict[int, int] = field(default_factory=dict)
    sharing: set[int] = field(default_factory=set)
    """Processes that have mapped memory which those forked from them would share."""
    limited: set[int] = field(default_factory=set)
    """Processes whose CPU time the harness has limited."""
    mmap: int = field(default_factory=partial(syscall_number, "mmap"))
    prlimit: int = field(default_factory=partial(syscall_number, "prlimit64"))
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    """Starts in a row that did not end in READY."""
    log: int = -1
    group: Path | None = None
    """Its control group."""
    oom_kills: int = 0
    """Of its group, as far as they are accounted for."""
    init: int = 0
    """First process of the pid namespace, if there is one: all others end before it does."""

    def start(self) -> socket.socket:
        """Execute the sandbox; the channel to poll."""
        self.channel, theirs = make_channel()
        # A pipe, since RLIMIT_FSIZE forbids the sandbox any file.
        self.log, log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        command = layers.command(self.settings.layers, self.kind, theirs.fileno(), self.settings.memory_mb)
        if self.settings.layers.cgroup is not None:
            self.group = cgroups.make(Path(self.settings.layers.cgroup), self.kind, self.settings.group_mb << 20)
            command = cgroups.entering(self.group, command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            env=layers.ENVIRONMENT,
            cwd="/",
            # Without a pid namespace: a group that is orphaned, and so hung up, when the supervisor dies.
            process_group=0 if self.settings.layers.bwrap is None else None,
        )
        theirs.close()
        os.close(log)
        self.state = ServerState.WARMING
        return self.channel

    def advance(self) -> bool:
        """Take the next step of the handshake, now that the channel is readable; True once READY.

        Raises:
            ProtocolError: the zygote said something else, or is gone.
        """
        assert self.channel is not None
        packet, pid, _, descriptors = receive(self.channel)
        if self.state is ServerState.WARMING and packet == b"W":
            self.pid = pid
            confined = self.settings.layers.seccomp
            message = {
                "ranges": _heap_ranges(pid),
                "seccomp": confined,
                "seccomp_nr": syscall_number("seccomp"),
                "output_bytes": self.settings.output_bytes,
                "cpu_s": self.settings.cpu_s,
            }
            self.channel.send(json.dumps(message).encode())
            if confined:
                self.channel.send(compile_filter())
            self.state = ServerState.LOCKING
            return False
        if self.state is ServerState.LOCKING and packet == b"R" and pid == self.pid:
            if self.settings.layers.seccomp:
                if len(descriptors) != 1:
                    raise ProtocolError("the interpreter server sent no seccomp listener")
                self.listener = descriptors[0]
                os.set_blocking(self.listener, False)
            self.state = ServerState.READY
            self.failures = 0
            if self.settings.layers.bwrap is not None:
                self.init = _parent(pid)
            return True
        raise ProtocolError(f"the interpreter server ended while {self.state.name.lower()}: {self.tail()}")

    def permit(self, pid: int) -> None:
        """Let process `pid` fork once."""
        self.permits[pid] = self.permits.get(pid, 0) + 1

    def take_back(self, pid: int) -> None:
        """Process `pid` is not to fork after all."""
        if self.permits.get(pid, 0) > 1:
            self.permits[pid] -= 1
        else:
            self.permits.pop(pid, None)

    def answer(self) -> int:
        """Answer one notification: what `_proceeds` goes on, all else fails with EPERM.

        Returns the id of a process to be killed for insisting, else 0.
        """
        request = bytearray(80)
        try:
            fcntl.ioctl(self.listener, _NOTIF_RECV, request)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EAGAIN, errno.EINTR):
                return 0
            raise
        notification, pid, _, call = _NOTIF_HEAD.unpack_from(request)
        proceeds = self._proceeds(pid, call)
        if proceeds:
            response = _NOTIF_RESPONSE.pack(notification, 0, 0, _NOTIF_CONTINUE)
        else:
            response = _NOTIF_RESPONSE.pack(notification, 0, -errno.EPERM, 0)
        try:
            fcntl.ioctl(self.listener, _NOTIF_SEND, bytearray(response))
        except OSError as error:
            if error.errno == errno.ENOENT:  # The process was interrupted or died: it is not forking now.
                return 0
            raise
        if proceeds:
            if call not in (self.mmap, self.prlimit):
                self.take_back(pid)
            return 0
        self.strikes[pid] = self.strikes.get(pid, 0) + 1
        return pid if self.strikes[pid] >= STRIKES else 0

    def _proceeds(self, pid: int, call: int) -> bool:
        """Whether process `pid` may fork, map shared memory, which is noted, or limit its CPU time.

        The harness does the last in what the zygote itself forks, before any code; all other nodes inherit the limit.
        """
        if call == self.mmap:
            self.sharing.add(pid)
            return True
        if call == self.prlimit:
            if pid in self.limited or _parent(pid) != self.pid:
                return False
            self.limited.add(pid)
            return True
        return pid in self.permits

    def forget(self, pid: int) -> None:
        """Process `pid` is gone."""
        self.permits.pop(pid, None)
        self.strikes.pop(pid, None)
        self.sharing.discard(pid)
        self.limited.discard(pid)

    def killed_for_memory(self) -> bool | None:
        """Whether the kernel killed one more process of this server for memory than is accounted for; None: unknown.

        Accounts for one death.
        """
        kills = None if self.group is None else cgroups.oom_kills(self.group)
        if kills is None:
            return None
        if kills > self.oom_kills:
            self.oom_kills += 1
            return True
        return False

    def tail(self) -> str:
        """The last lines the sandbox wrote before it locked itself down."""
        try:
            return os.read(self.log, 1 << 16)[-1000:].decode("utf-8", "replace").strip()
        except BlockingIOError:
            return ""

    def kill(self) -> None:
        """End the sandbox and all that runs in it."""
        self.state = ServerState.DEAD
        if self.process is not None:
            if self.init and self.process.poll() is None:
                os.kill(self.init, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
            self.process = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        for name in ("listener", "log"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
        if self.group is not None:
            cgroups.remove(self.group, 0.1)
            self.group = None
        self.pid = self.init = self.oom_kills = 0
        self.permits.clear()
        self.strikes.clear()
        self.sharing.clear()
        self.limited.clear()


def _parent(pid: int) -> int:
    """The parent of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _heap_ranges(pid: int) -> list[tuple[int, int]]:
    """Writable anonymous mappings of `pid`, whose pages are worth collapsing; none where not readable."""
    ranges = []
    try:
        text = Path(f"/proc/{pid}/maps").read_text()
    except (PermissionError, FileNotFoundError):
        return []
    for line in text.splitlines():
        parts = line.split()
        if parts[1] == "rw-p" and (len(parts) == 5 or parts[5] == "[heap]"):
            start, end = (int(value, 16) for value in parts[0].split("-"))
            if end - start >= 1 << 21:
                ranges.append((start, end))
    return ranges
