"""The supervisor's side of the arithmetic lane (see `arithmetic`): one worker, packets of many steps.

The lane only ever says ok or error, quickly, for what it took on. Whatever it declines, and everything it
held when its worker took too long, broke the protocol or died, goes the ordinary way instead.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

from evolve.verify.server import ProtocolError, Server, ServerState, make_channel, receive

if TYPE_CHECKING:
    from evolve.verify.nodes import Job
    from evolve.verify.supervisor import Supervisor

BATCH = 32
"""Steps sent to the worker at once."""

PATIENCE_S = 0.25
"""CPU time after which the steps of a packet are taken away from the worker."""

WALL_S = 5.0
"""Wall time after which they are."""

MESSAGE_CHARS = 2200
"""Longest name and message of an exception that anything honest reports."""

_SURROGATES = re.compile("[\ud800-\udfff]")

REMEMBERED = 1 << 17
"""States known to be the lane's own."""


def check_result(body: Any, output_bytes: int) -> dict[str, Any]:
    """A step's result, checked member by member; lone surrogates, which UTF-8 has none of, become U+FFFD.

    Raises:
        ProtocolError: it is not what the harness sends.
    """
    shape: dict[str, Any] = {"s": str, "o": str, "t": bool}
    if isinstance(body, dict) and body.get("s") == "error":
        shape |= {"e": str, "m": str, "l": int | None}
    if not isinstance(body, dict) or set(body) != set(shape) or body["s"] not in ("ok", "error"):
        raise ProtocolError("a malformed result")
    for name, kind in shape.items():
        if not isinstance(body[name], kind):
            raise ProtocolError("a malformed result")
    if (
        len(body["o"].encode("utf-8", "surrogatepass")) > output_bytes
        or len(body.get("e", "") + body.get("m", "")) > MESSAGE_CHARS
    ):
        raise ProtocolError("a result beyond its caps")
    return {name: _SURROGATES.sub("\ufffd", value) if isinstance(value, str) else value for name, value in body.items()}


class Lane:
    """The worker, the steps it has, and those that wait for it."""

    def __init__(self, owner: Supervisor) -> None:
        self.owner = owner
        self.waiting: deque[Job] = deque()
        self.sent: list[Job] = []
        self.done: OrderedDict[str, None] = OrderedDict()
        """Keys of states that the lane has reached: to rebuild one, its codes are run in one go."""
        self.server: Server | None = None
        self.channel: socket.socket | None = None
        self.pid, self.pidfd, self.clock = 0, -1, 0
        self.deadline: float | None = None
        self.began = self.began_cpu = 0.0

    @property
    def starting(self) -> bool:
        """Whether a worker was commanded that is not known yet."""
        return self.channel is not None and self.pid == 0

    def pump(self) -> None:
        """Send what waits, when the worker is free."""
        if not self.waiting or self.sent:
            return
        if self.channel is None:
            self._start()
        if self.pid == 0 or self.channel is None:
            return
        batch = [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]
        self.sent = batch
        self.began, self.began_cpu = time.monotonic(), time.clock_gettime(self.clock)
        self.deadline = self.began + PATIENCE_S
        try:
            self.channel.send(b"".join((b"[", b",".join(_encode(job) for job in batch), b"]")))
        except OSError:  # Too long for a packet, or the worker is gone: dealt with at the next turn.
            self.deadline = 0.0
            self.began = -WALL_S

    def _start(self) -> None:
        """Have the light server fork a worker."""
        server = self.owner.server("light")
        if server.state is not ServerState.READY or server.channel is None:
            return
        self.server = server
        self.channel, theirs = make_channel()
        self.owner.watch(self.channel, self)
        server.permit(server.pid)
        self.began = time.monotonic()
        self.deadline = self.began + WALL_S
        try:
            socket.send_fds(server.channel, [b"A"], [theirs.fileno()])
        except OSError:
            self.deadline = 0.0
        finally:
            theirs.close()

    def on_packet(self) -> None:
        """The worker's greeting, its results, or its death."""
        assert self.channel is not None
        try:
            packet, pid, _, descriptors = receive(self.channel)
            for descriptor in descriptors:
                os.close(descriptor)
            if packet == b"H" and self.pid == 0:
                self.pidfd = os.pidfd_open(pid)
                self.pid, self.clock = pid, (~pid << 3) | 2
                self.deadline = None
            elif self.sent and pid == self.pid and packet[:1] == b"R":
                self._results(json.loads(packet[1:]))
            else:
                raise ProtocolError("a frame out of turn")
        except BlockingIOError:
            return
        except (ProtocolError, ProcessLookupError, ValueError, RecursionError):
            self._give_up()

    def _results(self, bodies: Any) -> None:
        if not isinstance(bodies, list) or len(bodies) != len(self.sent):
            raise ProtocolError("a malformed result")
        checked = [None if body is None else check_result(body, self.owner.settings.output_bytes) for body in bodies]
        jobs, self.sent, self.deadline = self.sent, [], None
        share = 1.0 / len(jobs)
        cpu = (time.clock_gettime(self.clock) - self.began_cpu) * share
        wall = (time.monotonic() - self.began) * share
        for job, body in zip(jobs, checked, strict=True):
            if body is None:
                self._decline(job)
                continue
            job.index = job.last
            status = body.pop("s")
            if status == "ok":
                self.done[job.keys[-1]] = None
                if len(self.done) > REMEMBERED:
                    self.done.popitem(last=False)
            self.owner.counts["lane"] += 1
            self.owner.finish(job, status, body, cpu, wall)

    def _decline(self, job: Job) -> None:
        self.owner.counts["lane_declined"] += 1
        job.lane = False
        self.owner.ready.append(job)

    def check(self) -> None:
        """Take back what the worker has had for too long, unless it was only waiting for a core."""
        now = time.monotonic()
        if self.deadline is None or now < self.deadline:
            return
        if self.sent and self.pid:
            spent = time.clock_gettime(self.clock) - self.began_cpu
            if spent < PATIENCE_S and now - self.began < WALL_S:
                self.deadline = now + max(0.005, PATIENCE_S - spent)
                return
        self._give_up()

    def _give_up(self) -> None:
        """End the worker; what it had, and what waits if it never came up, goes the ordinary way."""
        self.owner.counts["lane_restarts"] += 1
        started = self.pid != 0
        held = self.stop()
        if not started:
            held += self.waiting
            self.waiting.clear()
        for job in held:
            self._decline(job)

    def stop(self) -> list[Job]:
        """End the worker; the steps it had."""
        if self.channel is not None:
            self.owner.owners.pop(self.channel.fileno(), None)
            self.channel.close()
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                self.owner.counts["lane_deaths"] += 1
            os.close(self.pidfd)
        if self.server is not None and self.pid:
            self.server.forget(self.pid)
        self.channel, self.server = None, None
        self.pid, self.pidfd, self.deadline = 0, -1, None
        held, self.sent = self.sent, []
        return held


def _encode(job: Job) -> bytes:
    return json.dumps(job.codes).encode()
