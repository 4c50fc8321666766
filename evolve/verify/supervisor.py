"""A supervisor: one process per core that owns interpreter servers and the live snapshots in them.

Single-threaded, never blocks. Reads requests from the verifier actor (`wire`), makes servers fork nodes
(`runner`), and continues each request from its deepest live ancestor. It ends when the actor's socket closes.
"""

from __future__ import annotations

import ctypes
import json
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from typing import Any

from evolve.verify.lane import Lane
from evolve.verify.layers import Layers
from evolve.verify.nodes import Job, Node
from evolve.verify.runner import Runner
from evolve.verify.server import FRAME, ProtocolError, Server, ServerSettings, ServerState
from evolve.verify.wire import Wire

ATTEMPTS = 3
"""How often a request is tried before its failure is called the sandbox's own."""

MERGED_CHARS = FRAME // 16
"""Most characters of codes that are run in one go: JSON makes up to 12 bytes of one."""

BASE_MB = 512
"""Memory of an interpreter server without its nodes, generously."""


class Supervisor:
    """The event loop, the jobs that wait, and the servers they need."""

    def __init__(self, actor: socket.socket, settings: ServerSettings, snapshot_mb: int, slots: int) -> None:
        self.settings = settings
        self.slots = slots
        self.poll = select.epoll()
        self.wire = Wire(actor, self.poll)
        self.owners: dict[int, Any] = {}
        self.servers: dict[str, Server] = {}
        self.counts: Counter[str] = Counter()
        self.runner = Runner(self, snapshot_mb)
        self.lane = Lane(self)
        self.ready: deque[Job] = deque()
        self.building: dict[str, list[Job]] = {}
        """Jobs that wait for a state that another is making, by its key."""

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serve until the actor goes away."""
        try:
            while True:
                events = self.poll.poll(self._patience())
                for fd, _ in events:
                    if fd != self.wire.fileno():
                        self._dispatch(fd)
                        continue
                    requests = self.wire.read()
                    if requests is None:
                        return
                    for request in requests:
                        self._receive(request)
                self.runner.check_limits()
                self.lane.check()
                self._pump()
                self.lane.pump()
                self.wire.flush()
        finally:
            for server in self.servers.values():
                self.drop_server(server)

    def _patience(self) -> float | None:
        """Seconds until the first limit may be reached; None: nothing is running."""
        deadlines = [node.checked for node in self.runner.active]
        deadlines += [at for at in (self.lane.deadline, self.runner.sweep_at) if at is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _dispatch(self, fd: int) -> None:
        owner = self.owners.get(fd)
        if owner is self.lane:
            self.lane.on_packet()
        elif isinstance(owner, Node):
            self.runner.hear(owner)
        elif isinstance(owner, Server):
            self._on_server(owner, fd)

    def _receive(self, request: dict[str, Any]) -> None:
        if request["o"] == "S":
            self.wire.respond({"i": request["i"], "stats": self.stats()})
        else:
            self.ready.append(Job(request))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is live now."""
        return {
            **self.counts,
            "snapshots": len(self.runner.live),
            "snapshot_bytes": self.runner.live.memory,
            "servers": sum(s.state is ServerState.READY for s in self.servers.values()),
            "queued": len(self.ready) + len(self.runner.active),
            "lane_workers": int(self.lane.pid != 0),
        }

    def watch(self, channel: socket.socket, owner: Any) -> None:
        """Have `owner` told when `channel` can be read."""
        self.owners[channel.fileno()] = owner
        self.poll.register(channel, select.EPOLLIN)

    # ------------------------------------------------------------------ jobs

    def _pump(self) -> None:
        """Start what can be started."""
        waiting: list[Job] = []
        while self.ready and len(self.runner.active) < self.slots:
            job = self.ready.popleft()
            if job.lane:
                self.lane.waiting.append(job)
                continue
            server = self.server(job.kind)
            if server.state is not ServerState.READY or not self._place(job, server):
                waiting.append(job)
        self.ready.extendleft(reversed(waiting))

    def _place(self, job: Job, server: Server) -> bool:
        """Continue `job` from its deepest live ancestor; False: when that has taken up the commands it has."""
        parent, start = self.runner.live.deepest(job.keys[:-1]) if job.verb == b"C" else (None, 0)
        dead_end = self.runner.live.dead_end(job.keys[start:-1])
        if dead_end is not None:
            job.index = job.last
            self.finish(job, dead_end.status, {"m": dead_end.message}, 0.0, 0.0)
            return True
        job.index = job.merged = start
        room = MERGED_CHARS - len(job.codes[start])
        while job.index < job.last - 1 and job.keys[job.index] in self.lane.done:
            room -= len(job.codes[job.index + 1])
            if room < 0:
                break
            job.index += 1
        if start < job.last:
            waiters = self.building.get(job.keys[job.index])
            if waiters is not None:
                waiters.append(job)
                return True
            self.building[job.keys[job.index]] = []
        if self.runner.fork(job, server, parent):
            return True
        if start < job.last:
            del self.building[job.keys[job.index]]
        return False

    def resume(self, job: Job) -> None:
        """A step of a job's prefix was run again: on to the next, for it and for those that waited."""
        self._wake(job.keys[job.index])
        self.ready.appendleft(job)

    def finish(self, job: Job, status: str, body: dict[str, Any], cpu: float, wall: float) -> None:
        """Send a job's verdict; wake those that waited for a step it was building.

        A step of the prefix, which was ok once, that now does not keep its limits is no verdict on the last: it is run
        once more.
        """
        if job.index < job.last:
            message = f"step {job.index + 1} of the prefix failed when run again: {body.get('m', '')}"
            if status in ("timeout", "oom", "crash"):
                job.attempts = max(job.attempts, ATTEMPTS - 2)
                self.retry(job, message)
                return
            self._wake(job.keys[job.index])
            body.update(m=message, l=None, p=True)
        self.counts["executions" if job.verb == b"C" else "gradings"] += 1
        self.counts[status] += 1
        replayed = bool(job.digests)
        self.counts["replays"] += replayed
        response = {"i": job.id, "s": status, "cpu": cpu, "wall": wall, **body}
        if replayed:
            response["d"] = job.digests
        self.wire.respond(response)

    def _wake(self, key: str) -> None:
        for job in self.building.pop(key, ()):
            self.ready.appendleft(job)

    def retry(self, job: Job, why: str) -> None:
        """The sandbox failed, not the code."""
        self.counts["sandbox_failures"] += 1
        job.attempts += 1
        if job.index < job.last:
            self._wake(job.keys[job.index])
        if job.attempts >= ATTEMPTS:
            job.index = job.last
            self.finish(job, "infrastructure", {"m": why}, 0.0, 0.0)
        else:
            job.digests.clear()
            self.ready.append(job)

    # ------------------------------------------------------------------ servers

    def server(self, kind: str) -> Server:
        """The server of a kind, which is started where it is not up."""
        server = self.servers.get(kind)
        if server is None:
            server = self.servers[kind] = Server(kind, self.settings)
        if server.state is ServerState.DEAD:
            channel = server.start()
            self.watch(channel, server)
        return server

    def _on_server(self, server: Server, fd: int) -> None:
        if fd == server.listener:
            pid = server.answer()
            if pid:
                self.runner.insisted(server, pid)
            return
        try:
            if server.state is ServerState.READY:
                raise ProtocolError(f"the interpreter server died: {server.tail()}")
            if server.advance() and server.listener >= 0:
                self.owners[server.listener] = server
                self.poll.register(server.listener, select.EPOLLIN)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            server.failures += server.state is not ServerState.READY
            self.drop_server(server)
            self.counts["server_restarts"] += 1
            if server.failures >= ATTEMPTS:
                server.failures = 0
                self._refuse_waiting(server.kind, str(error))

    def _refuse_waiting(self, kind: str, why: str) -> None:
        """A kind of server does not start: its requests have failed for the sandbox's own reasons."""
        waiting = [job for job in (*self.ready, *self.lane.waiting) if job.kind == kind]
        self.ready = deque(job for job in self.ready if job.kind != kind)
        if kind == "light":
            self.lane.waiting.clear()
        for job in waiting:
            job.index = job.last
            self.finish(job, "infrastructure", {"m": why}, 0.0, 0.0)

    def drop_server(self, server: Server) -> None:
        """End a server, its snapshots, and what runs in it; the requests it held are tried again."""
        for fd in [fd for fd, owner in self.owners.items() if owner is server]:
            del self.owners[fd]
        held = self.runner.end_all_of(server)
        server.kill()
        if self.lane.server is server:
            held += self.lane.stop()
        for job in held:
            self.retry(job, "the interpreter server died")


def main() -> None:
    """Entry: `supervisor FD JSON`, with the actor's socket and the settings."""
    fd, text = int(sys.argv[1]), sys.argv[2]
    options = json.loads(text)
    found = options["layers"]
    found["bwrap"] = None if found["bwrap"] is None else tuple(found["bwrap"])
    settings = ServerSettings(
        layers=Layers(**found),
        memory_mb=options["memory_mb"],
        group_mb=options["snapshot_mb"] + options["slots"] * options["memory_mb"] + BASE_MB,
        cpu_s=options["cpu_s"],
        output_bytes=options["output_bytes"],
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.layers.bwrap is None:
        # Nodes whose parents were evicted come to this process, which then need not wait for them.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    actor = socket.socket(fileno=fd)
    Supervisor(actor, settings, options["snapshot_mb"], options["slots"]).run()


if __name__ == "__main__":
    main()
