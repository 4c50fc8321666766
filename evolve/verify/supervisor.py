"""A supervisor: one process per core that owns interpreter servers and the live snapshots in them.

Single-threaded, never blocks. Reads requests from the verifier actor, makes servers fork nodes, watches
their CPU clocks, and keeps each finished node as a stopped snapshot for its children.

Requests and responses are JSON after a 4-byte big-endian length. It ends when the actor's socket closes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import Counter, OrderedDict, deque
from typing import Any

from evolve.verify.lane import Lane
from evolve.verify.layers import Layers
from evolve.verify.nodes import LIVE, RUNNING, STARTING, Job, Node, digest, parse_result, private_bytes, process_parents
from evolve.verify.server import (
    ProtocolError,
    Server,
    ServerSettings,
    ServerState,
    make_channel,
    receive,
)

ATTEMPTS = 3
"""How often a request is tried before its failure is called the sandbox's own."""

GRACE_S = 0.02
"""How long after a node's death its server's death would have been noticed."""


class Supervisor:
    """The event loop."""

    def __init__(self, actor: socket.socket, settings: ServerSettings, snapshot_mb: int, slots: int) -> None:
        self.actor = actor
        self.settings = settings
        self.budget = snapshot_mb << 20
        self.slots = slots
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.most_live = max(8, min(hard, 1 << 16) // 3 - 32)
        self.poll = select.epoll()
        self.owners: dict[int, Any] = {}
        self.servers: dict[str, Server] = {}
        self.live: OrderedDict[str, Node] = OrderedDict()
        self.pids: dict[int, Node] = {}
        self.active: set[Node] = set()
        self.ready: deque[Job] = deque()
        self.building: dict[str, list[Job]] = {}
        self.lane = Lane(self)
        self.memory = 0
        self.counts: Counter[str] = Counter()
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.swept = time.monotonic()

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serve until the actor goes away."""
        self.actor.setblocking(False)
        self.poll.register(self.actor, select.EPOLLIN)
        try:
            while True:
                events = self.poll.poll(self._patience())
                for fd, _ in events:
                    if fd == self.actor.fileno():
                        if not self._read_actor():
                            return
                    else:
                        self._dispatch(fd)
                self._check_limits()
                self.lane.check()
                self._pump()
                self.lane.pump()
                self._flush()
        finally:
            for server in self.servers.values():
                self._drop_server(server)

    def _patience(self) -> float | None:
        """Seconds until the first limit may be reached; None: nothing is running."""
        deadlines = [node.checked for node in self.active]
        if self.lane.deadline is not None:
            deadlines.append(self.lane.deadline)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _dispatch(self, fd: int) -> None:
        owner = self.owners.get(fd)
        if owner is self.lane:
            self.lane.on_packet()
        elif isinstance(owner, Node):
            self._on_node(owner)
        elif isinstance(owner, Server):
            self._on_server(owner, fd)

    def _read_actor(self) -> bool:
        try:
            data = self.actor.recv(1 << 18)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not data:
            return False
        self.incoming += data
        while len(self.incoming) >= 4:
            (size,) = struct.unpack_from(">I", self.incoming)
            if len(self.incoming) < 4 + size:
                break
            request = json.loads(self.incoming[4 : 4 + size])
            del self.incoming[: 4 + size]
            if request["o"] == "S":
                self._respond({"i": request["i"], "stats": self.stats()})
            else:
                self.ready.append(Job(request))
        return True

    def _respond(self, response: dict[str, Any]) -> None:
        body = json.dumps(response, separators=(",", ":")).encode()
        self.outgoing += struct.pack(">I", len(body)) + body

    def _flush(self) -> None:
        if not self.outgoing:
            return
        try:
            sent = self.actor.send(self.outgoing)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return  # The next read finds the actor gone.
        del self.outgoing[:sent]
        interest = select.EPOLLIN | (select.EPOLLOUT if self.outgoing else 0)
        self.poll.modify(self.actor, interest)

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is live now."""
        return {
            **self.counts,
            "snapshots": len(self.live),
            "snapshot_bytes": self.memory,
            "servers": sum(s.state is ServerState.READY for s in self.servers.values()),
            "queued": len(self.ready) + len(self.active),
            "lane_workers": int(self.lane.pid != 0),
        }

    def watch(self, channel: socket.socket, owner: Any) -> None:
        """Have `owner` told when `channel` can be read."""
        self.owners[channel.fileno()] = owner
        self.poll.register(channel, select.EPOLLIN)

    # ------------------------------------------------------------------ scheduling

    def _pump(self) -> None:
        """Start what can be started."""
        waiting: list[Job] = []
        while self.ready and len(self.active) < self.slots:
            job = self.ready.popleft()
            if job.lane:
                self.lane.waiting.append(job)
                continue
            server = self.server(job.kind)
            if server.state is not ServerState.READY:
                waiting.append(job)
            else:
                self._place(job, server)
        self.ready.extendleft(reversed(waiting))

    def _place(self, job: Job, server: Server) -> None:
        """Continue `job` from its deepest live ancestor."""
        parent = None
        start = 0
        if job.verb == b"C":
            for index in range(job.last - 1, -1, -1):
                parent = self.live.get(job.keys[index])
                if parent is not None:
                    self.live.move_to_end(parent.key)
                    start = index + 1
                    break
        job.index = job.merged = start
        while job.index < job.last - 1 and job.keys[job.index] in self.lane.done:
            job.index += 1
        if start < job.last:
            waiters = self.building.get(job.keys[job.index])
            if waiters is not None:
                waiters.append(job)
                return
            self.building[job.keys[job.index]] = []
        self._fork(job, server, parent)

    def _fork(self, job: Job, server: Server, parent: Node | None) -> None:
        """Command a fork of `parent` (or of the server itself) to run the job's next step."""
        ours, theirs = make_channel()
        node = Node(server, parent, job, ours)
        source = server.channel if parent is None else parent.channel
        pid = server.pid if parent is None else parent.pid
        assert source is not None
        if parent is not None:
            if parent.forking == 0:
                parent.signal(signal.SIGCONT)
            parent.forking += 1
        if job.merged < job.index:
            packet = b"M" + json.dumps(job.codes[job.merged : job.index + 1]).encode()
        else:
            packet = job.verb + job.codes[job.index].encode("utf-8", "surrogatepass")
        self.active.add(node)
        self.watch(ours, node)
        node.checked = node.started + min(job.wall_s, job.cpu_s + 2.0)
        server.permit(pid)
        try:
            socket.send_fds(source, [packet], [theirs.fileno()])
        except OSError as error:
            # The other end of `ours` closes now, which is taken as the node's death.
            self.counts[f"fork_{errno.errorcode.get(error.errno or 0, 'failed')}"] += 1
        finally:
            theirs.close()

    def finish(self, job: Job, status: str, body: dict[str, Any], cpu: float, wall: float) -> None:
        """Send a job's verdict; wake those that waited for a step it was building."""
        if job.index < job.last:
            self._wake(job.keys[job.index])
            if status != "infrastructure":
                body["m"] = f"step {job.index + 1} of the prefix failed when run again: {body.get('m', '')}"
                body["l"] = None
        self.counts["executions" if job.verb == b"C" else "gradings"] += 1
        self.counts[status] += 1
        replayed = bool(job.digests)
        self.counts["replays"] += replayed
        response = {"i": job.id, "s": status, "cpu": cpu, "wall": wall, **body}
        if replayed:
            response["d"] = job.digests
        self._respond(response)

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

    # ------------------------------------------------------------------ nodes

    def _on_node(self, node: Node) -> None:
        try:
            packet, pid, descriptors = receive(node.channel)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            self._violation(node, str(error))
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if not packet:
            self._on_death(node)
        elif node.state == STARTING and packet == b"H" and pid not in self.pids and pid != node.server.pid:
            self._greeted(node, pid)
        elif node.state == RUNNING and pid == node.pid and packet[:1] == b"R":
            self._on_result(node, packet)
        else:
            self._violation(node, "a frame out of turn")

    def _greeted(self, node: Node, pid: int) -> None:
        try:
            node.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            # It ran and died before this: the code's doing, as its parent did fork.
            self._stop_parent(node)
            node.state = RUNNING
            self._on_death(node)
            return
        node.pid = pid
        node.clock = (~pid << 3) | 2
        node.state = RUNNING
        self.pids[pid] = node
        job = node.job
        assert job is not None
        node.checked = node.started + min(job.cpu_s, job.wall_s)
        self._stop_parent(node)

    def _stop_parent(self, node: Node) -> None:
        """A fork of the parent is over: stop it again, unless it owes others."""
        parent, node.parent = node.parent, None
        if parent is not None and parent.pidfd >= 0:
            parent.forking -= 1
            if parent.forking == 0:
                parent.signal(signal.SIGSTOP)

    def _on_result(self, node: Node, packet: bytes) -> None:
        cpu, wall = node.cpu(), time.monotonic() - node.started
        job = node.job
        assert job is not None
        try:
            body = parse_result(packet, job.verb)
        except ProtocolError as error:
            self._violation(node, str(error))
            return
        self.active.discard(node)
        node.job = None
        status = body.pop("s")
        if status == "ok" and job.verb == b"C":
            node.signal(signal.SIGSTOP)
            self._keep(node)
        else:
            self._kill(node)
        if status != "ok" or job.index == job.last:
            self.finish(job, status, body, cpu, wall)
            return
        if job.keys[job.index] not in self.lane.done:
            job.digests.append((job.index, digest(body["o"])))
        self._wake(job.keys[job.index])
        self.ready.appendleft(job)

    def _keep(self, node: Node) -> None:
        """Make a finished node a snapshot; evict the least recently used beyond the budget."""
        previous = self.live.pop(node.key, None)
        if previous is not None:
            self._kill(previous)
        node.state = LIVE
        node.memory = private_bytes(node.pid)
        self.memory += node.memory
        self.live[node.key] = node
        if self.memory <= self.budget and len(self.live) <= self.most_live:
            return
        for candidate in list(self.live.values())[:-1]:
            if self.memory <= self.budget and len(self.live) <= self.most_live:
                return
            if candidate.forking == 0:
                self.counts["evictions"] += 1
                self._kill(candidate)

    def _kill(self, node: Node) -> None:
        """End a node's process and forget it."""
        if node.pidfd >= 0:
            node.signal(signal.SIGKILL)
            os.close(node.pidfd)
            node.pidfd = -1
            self.pids.pop(node.pid, None)
            node.server.forget(node.pid)
        if node.state == LIVE:
            if self.live.get(node.key) is node:
                del self.live[node.key]
            self.memory -= node.memory
        node.state = LIVE
        node.memory = 0
        self.active.discard(node)
        self.owners.pop(node.channel.fileno(), None)
        node.channel.close()
        self._stop_parent(node)

    def _on_death(self, node: Node) -> None:
        """A node's channel closed without our doing."""
        if node.state == LIVE:
            self._kill(node)
            return
        # Its server may be dying too, which is not the code's doing: judge when that would be known.
        node.dead = True
        node.checked = time.monotonic() + GRACE_S
        self.poll.unregister(node.channel)

    def _judge_dead(self, node: Node) -> None:
        """A node died some time ago, and its server lives."""
        if node.state == STARTING:
            self._lineage_failed(node, "crash", "the state to continue from died")
        else:
            self._fail(node, "crash", "the interpreter died of the code")

    def _fail(self, node: Node, status: str, message: str) -> None:
        """End a running node and report it."""
        job = node.job
        assert job is not None
        cpu, wall = node.cpu() if node.pid else 0.0, time.monotonic() - node.started
        node.job = None
        self._kill(node)
        self.finish(job, status, {"m": message}, cpu, wall)

    def _lineage_failed(self, node: Node, status: str, message: str) -> None:
        """The parent did not fork: its fault when it is a node, the sandbox's when it is the server."""
        parent, job, server = node.parent, node.job, node.server
        assert job is not None
        if parent is not None:
            self._kill(parent)
            self._fail(node, status, message)
        else:
            node.job = None
            self._kill(node)
            self._drop_server(server)
            self.retry(job, f"the interpreter server did not fork: {message}")
        self._sweep()

    def _violation(self, node: Node, why: str) -> None:
        """A node broke the protocol: it and what it would leave behind are ended."""
        self.counts["violations"] += 1
        parent = node.parent
        if node.job is not None:
            self._fail(node, "refused", f"the code tampered with the sandbox's protocol ({why})")
        else:
            self._kill(node)
        if parent is not None:
            self._kill(parent)
        self._sweep()

    def _check_limits(self) -> None:
        """Kill what is over its CPU or wall time."""
        now = time.monotonic()
        for node in [node for node in self.active if node.checked <= now]:
            job = node.job
            if job is None or node not in self.active:  # Ended with another one's server or lineage.
                continue
            if node.dead:
                self._judge_dead(node)
                continue
            if node.state == STARTING:
                self._lineage_failed(node, "timeout", "the state to continue from did not answer")
                continue
            cpu, wall = node.cpu(), now - node.started
            if cpu >= job.cpu_s:
                self._fail(node, "timeout", f"more than {job.cpu_s:g} s of CPU time")
            elif wall >= job.wall_s:
                self._fail(node, "timeout", f"more than {job.wall_s:g} s of wall time")
            else:
                node.checked = now + max(0.001, min(job.cpu_s - cpu, job.wall_s - wall))

    # ------------------------------------------------------------------ servers

    def server(self, kind: str) -> Server:
        server = self.servers.get(kind)
        if server is None:
            server = self.servers[kind] = Server(kind, self.settings)
        if server.state is ServerState.DEAD:
            channel = server.start()
            self.watch(channel, server)
        return server

    def _on_server(self, server: Server, fd: int) -> None:
        if fd == server.listener:
            pid = server.answer_fork()
            if pid:
                self._insisted(server, pid)
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
            self._drop_server(server)
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

    def _insisted(self, server: Server, pid: int) -> None:
        """A process goes on forking though it is refused."""
        node = self.pids.get(pid)
        if node is not None and node.state == RUNNING:
            self._fail(node, "crash", "killed: it went on trying to start processes")
        elif node is not None:
            self._violation(node, "it went on trying to start processes")
        elif pid != server.pid:
            self._sweep()

    def _drop_server(self, server: Server) -> None:
        """End a server, its snapshots, and what runs in it; the requests it held are tried again."""
        for fd in [fd for fd, owner in self.owners.items() if owner is server]:
            del self.owners[fd]
        held: list[Job] = []
        for node in [*self.active, *self.live.values()]:
            if node.server is server:
                if node.job is not None:
                    held.append(node.job)
                    node.job = None
                self._kill(node)
        server.kill()
        if self.lane.server is server:
            held += self.lane.stop()
        for job in held:
            self.retry(job, "the interpreter server died")

    # ------------------------------------------------------------------ strays

    def _sweep(self) -> None:
        """Kill processes below this one that no node accounts for: a child that never greeted."""
        known = {*self.pids, self.lane.pid}
        parents = {pid: parent for pid, parent, _ in process_parents()}
        for server in self.servers.values():
            pid = server.pid or (server.process.pid if server.process else 0)
            if server.state is not ServerState.READY:
                return  # Its processes cannot be told apart yet; the next sweep will.
            while pid and pid != os.getpid():
                known.add(pid)
                pid = parents.get(pid, 0)
        if self.lane.starting or any(node.state == STARTING for node in self.active):
            return
        mine = os.getpid()
        for pid in parents:
            ancestor = pid
            while ancestor and ancestor != mine:
                ancestor = parents.get(ancestor, 0)
            if ancestor == mine and pid != mine and pid not in known:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # It was one of those just killed, and is gone.
                    continue
                self.counts["strays"] += 1


def main() -> None:
    """Entry: `supervisor FD JSON`, with the actor's socket and the settings."""
    fd, text = int(sys.argv[1]), sys.argv[2]
    options = json.loads(text)
    found = options["layers"]
    found["bwrap"] = None if found["bwrap"] is None else tuple(found["bwrap"])
    settings = ServerSettings(
        layers=Layers(**found),
        memory_mb=options["memory_mb"],
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
