"""What a supervisor keeps track of: jobs, and the processes that run them."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolve.verify.deaths import Death
from evolve.verify.lane import check_result
from evolve.verify.server import ProtocolError, Server

STARTING, RUNNING, LIVE = range(3)
"""A node's states: commanded; known, and running its step; a stopped snapshot."""

PAGE = resource.getpagesize()


class Node:
    """One forked process: a step that is being run, or the stopped snapshot it left."""

    __slots__ = (
        "channel",
        "checked",
        "clock",
        "dead",
        "ended",
        "fate",
        "forking",
        "greeted",
        "heirs",
        "job",
        "key",
        "memory",
        "origin",
        "parent",
        "parent_cpu",
        "peak",
        "pid",
        "pidfd",
        "server",
        "started",
        "state",
    )

    def __init__(self, server: Server, parent: Node | None, job: Job, channel: socket.socket) -> None:
        self.server, self.parent, self.channel = server, parent, channel
        self.job: Job | None = job
        self.key = job.keys[job.index]
        self.state = STARTING
        self.pid, self.pidfd, self.clock = 0, -1, 0
        self.forking = 0
        self.memory = 0
        """What it is counted for as a snapshot, bytes."""
        self.origin = parent
        """The node it was forked from, whose pages it goes on sharing."""
        self.heirs = 0
        """Nodes forked from it that hold its pages, be they running, kept, or ended with heirs of their own."""
        self.ended = False
        if parent is not None:
            parent.heirs += 1
        self.peak = 0
        """Most memory that it was seen to use while it ran, bytes."""
        self.parent_cpu = parent.cpu() if parent is not None else 0.0
        """CPU seconds its parent had used when it was commanded to fork."""
        self.fate: Death | None = None
        """What a snapshot died of."""
        self.dead = False
        """Its channel has closed; why is not known yet."""
        self.started = self.greeted = time.monotonic()
        """When it was commanded, and when it was known."""
        self.checked = 0.0

    def cpu(self) -> float:
        """CPU seconds this process has used."""
        return cpu_s(self.clock)

    def signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return


class Job:
    """One request: run `codes[-1]` in the state that the codes before it leave."""

    __slots__ = (
        "attempts",
        "codes",
        "cpu_s",
        "digests",
        "id",
        "index",
        "keys",
        "kind",
        "lane",
        "lost",
        "merged",
        "verb",
        "wall_s",
    )

    def __init__(self, request: dict[str, Any]) -> None:
        self.id: int = request["i"]
        self.kind: str = request["k"]
        self.verb: bytes = request["o"].encode()
        self.codes: list[str] = request["c"]
        self.keys: list[str] = [f"{self.kind} {key}" for key in request["h"]]
        """Names of the states after each of the codes, in a server of this kind."""
        self.cpu_s: float = request["cpu"]
        self.wall_s: float = request["wall"]
        self.lane = bool(request.get("a"))
        """Whether to try the arithmetic lane first."""
        self.index = 0
        self.merged = 0
        """First of the codes that the node now running was given; `index` is the last."""
        self.attempts = 0
        self.lost: tuple[int, Death] | None = None
        """Index of the step that was last lost to what may not be the code's doing, and how it was."""
        self.digests: list[tuple[int, str]] = []
        """Index and output digest of each step of the prefix that had to be run again."""

    @property
    def last(self) -> int:
        return len(self.codes) - 1


def clock_of(pid: int) -> int:
    """The clock of the CPU time that a process has used."""
    return (~pid << 3) | 2


def cpu_s(clock: int) -> float:
    """What such a clock shows, seconds; 0.0 when its process is gone."""
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def process_parents() -> Iterator[tuple[int, int, str]]:
    """(process, its parent, its state letter) for all processes that can be seen."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = stat.rpartition(")")[2].split()
            yield int(entry.name), int(fields[1]), fields[0]


def private_bytes(pid: int) -> int:
    """Roughly the memory a process does not share: its minor faults, each of which made a page its own."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (hot path)
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return min(int(fields[7]), int(fields[21])) * PAGE


def waited_s(pid: int) -> float:
    """Seconds that a process was ready to run and waited for a core, without those of a wait that goes on.

    0.0 where the kernel does not count them.
    """
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:  # noqa: PTH123 (as above)
            return int(file.read().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def is_runnable(pid: int) -> bool:
    """Whether a process runs or waits for a core, and does not sleep."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (as above)
            return file.read().rpartition(b")")[2].split()[0] == b"R"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resident_bytes(pid: int) -> int:
    """The memory a process uses, shared or not; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123 (hot path)
            return int(file.read().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def digest(text: str) -> str:
    """A short digest of a step's output."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def parse_result(packet: bytes, verb: bytes, output_bytes: int) -> dict[str, Any]:
    """A result frame, checked member by member.

    Raises:
        ProtocolError: it is not what the harness sends.
    """
    try:
        body = json.loads(packet[1:])
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a malformed result") from error
    if verb == b"C":
        return check_result(body, output_bytes)
    graded = body.get("g") if isinstance(body, dict) else None
    if not isinstance(graded, list) or len(body) != 1 or not all(isinstance(value, int) for value in graded):
        raise ProtocolError("a malformed result")
    return {"s": "ok", "g": graded}
