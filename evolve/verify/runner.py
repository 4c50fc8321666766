"""The processes of a supervisor: forks nodes, hears what they say, holds them to their limits, ends them."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import time
from typing import TYPE_CHECKING

from evolve.verify.deaths import FOR_MEMORY, Death, await_end, cause_of_death
from evolve.verify.nodes import (
    LIVE,
    RUNNING,
    STARTING,
    Job,
    Node,
    clock_of,
    cpu_s,
    digest,
    is_runnable,
    parse_result,
    process_parents,
    resident_bytes,
    waited_s,
)
from evolve.verify.server import FRAME, ProtocolError, Server, ServerState, make_channel, pass_pidfds, receive
from evolve.verify.snapshots import Snapshots, gone

if TYPE_CHECKING:
    from evolve.verify.supervisor import Supervisor

GRACE_S = 0.02
"""How long after a node's death its server's death would have been noticed."""

SWEEP_S = 0.1
"""How long after a sweep that could not judge all processes there is another."""

SAMPLE_S = 0.05
"""How often the memory of a node that runs is looked at."""

STARVED = 10.0
"""Times its wall cap after which a step is given up that has waited for a core all the while."""

NEAR = 0.75
"""Part of the memory that a process may add to its server's from which a kill by nobody is taken to be for it."""


class Runner:
    """Nodes: those that run a step, and those that wait as snapshots. What becomes of jobs is the owner's."""

    def __init__(self, owner: Supervisor, snapshot_mb: int) -> None:
        self.owner = owner
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Two descriptors a snapshot, and some for all else.
        self.live = Snapshots(snapshot_mb << 20, max(8, min(hard, 1 << 16) // 3 - 32))
        self.pids: dict[int, Node] = {}
        self.active: set[Node] = set()
        self.sweep_at: float | None = None
        """When to look again for processes that no node accounts for."""

    def fork(self, job: Job, server: Server, parent: Node | None) -> bool:
        """Command a fork of `parent` (or of the server itself) to run the job's next step.

        False: it has so many commands that it takes no more now.
        """
        if job.merged < job.index:
            packet = b"M" + json.dumps(job.codes[job.merged : job.index + 1]).encode()
        else:
            packet = job.verb + job.codes[job.index].encode("utf-8", "surrogatepass")
        if len(packet) > FRAME:
            self.owner.finish(job, "refused", {"m": f"a command is longer than {FRAME} bytes"}, 0.0, 0.0)
            return True
        ours, theirs = make_channel()
        pass_pidfds(ours, True)
        node = Node(server, parent, job, ours)
        source = server.channel if parent is None else parent.channel
        pid = server.pid if parent is None else parent.pid
        assert source is not None
        if parent is not None:
            if parent.forking == 0:
                parent.signal(signal.SIGCONT)
            parent.forking += 1
        self.active.add(node)
        self.owner.watch(ours, node)
        node.checked = node.started + min(job.wall_s, job.cpu_s + 2.0)
        server.permit(pid)
        try:
            socket.send_fds(source, [packet], [theirs.fileno()])
        except BlockingIOError:
            server.take_back(pid)
            self.end(node)
            return False
        except OSError as error:
            # The other end of `ours` closes now, which is taken as the node's death.
            self.owner.counts[f"fork_{errno.errorcode.get(error.errno or 0, 'failed')}"] += 1
        finally:
            theirs.close()
        return True

    # ------------------------------------------------------------------ what nodes say

    def hear(self, node: Node) -> None:
        """A node's channel can be read."""
        try:
            packet, pid, pidfd, descriptors = receive(node.channel)
        except BlockingIOError:
            return
        except ConnectionResetError:  # It died before it read a command.
            self._on_death(node)
            return
        except (ProtocolError, OSError) as error:
            self._violation(node, str(error))
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if node.state == STARTING and packet == b"H" and pid not in self.pids and pid != node.server.pid:
            self._greeted(node, pid, pidfd)
            return
        if pidfd >= 0:
            os.close(pidfd)
        if not packet:
            self._on_death(node)
        elif node.state == RUNNING and pid == node.pid and packet[:1] == b"R":
            self._on_result(node, packet)
        else:
            self._violation(node, "a frame out of turn")

    def _greeted(self, node: Node, pid: int, pidfd: int) -> None:
        pass_pidfds(node.channel, False)
        try:
            node.pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        except ProcessLookupError:
            # It ran and died before this: the code's doing, as its parent did fork. Of what, nobody can say.
            self._stop_parent(node)
            node.server.forget(pid)
            node.state = RUNNING
            self._on_death(node)
            return
        node.pid = pid
        node.clock = clock_of(pid)
        node.state = RUNNING
        node.greeted = time.monotonic()
        self.pids[pid] = node
        job = node.job
        assert job is not None
        node.checked = node.greeted + min(job.cpu_s, job.wall_s, SAMPLE_S)
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
            body = parse_result(packet, job.verb, node.server.settings.output_bytes)
        except ProtocolError as error:
            self._violation(node, str(error))
            return
        if node.pid in node.server.sharing:
            self._fail(node, "refused", "the code mapped memory that later steps would share with each other")
            return
        self.active.discard(node)
        node.job = None
        status = body.pop("s")
        if status == "ok" and job.verb == b"C":
            node.signal(signal.SIGSTOP)
            self._keep(node)
        else:
            self.end(node)
        if status != "ok" or job.index == job.last:
            self.owner.finish(job, status, body, cpu, wall)
            return
        if job.keys[job.index] not in self.owner.lane.done:
            job.digests.append((job.index, digest(body["o"])))
        self.owner.resume(job)

    def _keep(self, node: Node) -> None:
        """Make a finished node a snapshot; evict the least recently used beyond the budget."""
        if node.key in self.live.nodes:  # Its step was also a replayed prefix; the other may be being forked.
            self.end(node)
            return
        node.state = LIVE
        self.live.add(node)
        for candidate in self.live.surplus():
            self.owner.counts["evictions"] += 1
            self.end(candidate)

    # ------------------------------------------------------------------ how nodes end

    def end(self, node: Node) -> None:
        """End a node's process and forget it."""
        if node.pidfd >= 0:
            node.signal(signal.SIGKILL)
            os.close(node.pidfd)
            node.pidfd = -1
            self.pids.pop(node.pid, None)
            node.server.forget(node.pid)
        self.live.discard(node)
        node.state = LIVE
        self.active.discard(node)
        self.owner.owners.pop(node.channel.fileno(), None)
        node.channel.close()
        self._stop_parent(node)

    def _on_death(self, node: Node) -> None:
        """A node's channel closed without our doing."""
        if node.state == LIVE:
            await_end(node.pidfd, GRACE_S)
            self._fall(node, cause_of_death(node.pidfd, node.server.killed_for_memory()))
            return
        # Its server may be dying too, which is not the code's doing: judge when that would be known.
        node.dead = True
        node.checked = time.monotonic() + GRACE_S
        self.owner.poll.unregister(node.channel)

    def _fall(self, node: Node, death: Death) -> None:
        """End a snapshot that has ended itself."""
        node.fate = death
        self.live.fell(node.key, death)
        self.end(node)

    def _judge_dead(self, node: Node) -> None:
        """A node died some time ago, and its server lives."""
        if node.state == STARTING:
            self._not_forked(node)
            return
        death = cause_of_death(node.pidfd, node.server.killed_for_memory())
        loaded, limit = resident_bytes(node.server.pid), node.server.settings.memory_mb << 20
        if death.status == "infrastructure" and node.peak - loaded > NEAR * (limit - loaded):
            death = Death("oom", FOR_MEMORY, False)
        if death.certain:
            self._fail(node, death.status, death.message)
        else:
            self._lose(node, death)

    def _lose(self, node: Node, death: Death) -> None:
        """End a node that was lost to what may not be the code's doing: its step is tried again.

        When it was lost in the same way before, and that is more than the sandbox's failure, it is called that.
        """
        job = node.job
        assert job is not None
        loss = (job.index, death)
        if death.status != "infrastructure" and job.lost == loss:
            self._fail(node, death.status, death.message)
            return
        job.lost = loss
        node.job = None
        self.end(node)
        self.owner.retry(job, death.message)

    def _fail(self, node: Node, status: str, message: str) -> None:
        """End a running node and report it."""
        job = node.job
        assert job is not None
        cpu, wall = node.cpu() if node.pid else 0.0, time.monotonic() - node.started
        node.job = None
        self.end(node)
        self.owner.finish(job, status, {"m": message}, cpu, wall)

    def _not_forked(self, node: Node) -> None:
        """A node was gone before it greeted, or the one to fork it is: the machine had no room, or the code did it."""
        parent = node.parent
        death = Death("infrastructure", "no process could be forked", False)
        if parent is not None:
            fate = parent.fate
            idle = parent.forking > 0 and node.server.permits.get(parent.pid, 0) >= parent.forking
            if fate is not None and fate.status in ("crash", "refused"):
                death = gone(fate)
            elif idle:
                death = Death("crash", "the state to continue from died", False)
            self.end(parent)
        if death.certain:
            self._fail(node, death.status, death.message)
            return
        self._lose(node, death)
        self.sweep()

    def _not_greeted(self, node: Node, now: float) -> None:
        """The parent did not fork in time: its fault where it ran on or slept, the machine's where it has to wait."""
        parent, job, server = node.parent, node.job, node.server
        assert job is not None
        patient = now - node.started < STARVED * job.wall_s
        if parent is None:
            if patient and is_runnable(server.pid):
                node.checked = now + SWEEP_S
                return
            node.job = None
            self.end(node)
            self.owner.drop_server(server)
            self.owner.retry(job, "the interpreter server did not fork in time")
        else:
            found = [(pid, state) for pid, above, state in process_parents() if self._forks_now(parent, pid, above)]
            states = {state for _, state in found}
            busy = sum(cpu_s(clock_of(pid)) for pid, _ in found) - node.parent_cpu > 0.5 * job.cpu_s
            if patient and not busy and "R" in states:
                node.checked = now + SWEEP_S
                return
            status = "timeout" if busy or states == {"S"} else "infrastructure"
            self.end(parent)
            self._lose(node, Death(status, "the state to continue from did not answer", False))
        self.sweep()

    def _forks_now(self, parent: Node, pid: int, above: int) -> bool:
        """Whether `pid`, child of `above`, is `parent` or a child of it that has not greeted."""
        return pid == parent.pid or (above == parent.pid and pid not in self.pids)

    def _violation(self, node: Node, why: str) -> None:
        """A node broke the protocol: it and what it would leave behind are ended, and what would continue from it."""
        self.owner.counts["violations"] += 1
        death = Death("refused", f"the code tampered with the sandbox's protocol ({why})", True)
        parent = node.parent
        if node.job is not None:
            self._fail(node, death.status, death.message)
        else:
            self._fall(node, death)
        if parent is not None:
            self._fall(parent, death)
        self.sweep()

    def insisted(self, server: Server, pid: int) -> None:
        """A process goes on trying to fork, or to limit its CPU time, though it is refused."""
        node = self.pids.get(pid)
        if node is not None and node.state == RUNNING:
            self._fail(node, "crash", "killed: it went on trying what is refused, as to start processes")
        elif node is not None:
            self._violation(node, "it went on trying what is refused, as to start processes")
        elif pid != server.pid:
            self.sweep()

    def check_limits(self) -> None:
        """Kill what is over its CPU or wall time, and what an earlier sweep has left."""
        now = time.monotonic()
        if self.sweep_at is not None and self.sweep_at <= now:
            self.sweep()
        for node in [node for node in self.active if node.checked <= now]:
            job = node.job
            if job is None or node not in self.active:  # Ended with another one's server or lineage.
                continue
            if node.dead:
                self._judge_dead(node)
                continue
            if node.state == STARTING:
                self._not_greeted(node, now)
                continue
            self._check_times(node, job, now)

    def _check_times(self, node: Node, job: Job, now: float) -> None:
        """End a running node that is over its CPU time or its wall cap, or say when to look again.

        The cap is for those that sleep: time that a node waited for a core is the machine's, and does not count.
        """
        cpu, wall = node.cpu(), now - node.greeted
        node.peak = max(node.peak, resident_bytes(node.pid))
        starved = wall >= STARVED * job.wall_s
        if wall >= job.wall_s:
            wall -= waited_s(node.pid)
        if cpu >= job.cpu_s:
            self._fail(node, "timeout", f"more than {job.cpu_s:g} s of CPU time")
        elif wall >= job.wall_s and not is_runnable(node.pid):
            self._fail(node, "timeout", f"more than {job.wall_s:g} s of wall time")
        elif starved:
            self._lose(node, Death("infrastructure", "the machine had no core to run the code on", False))
        else:
            node.checked = now + max(0.002, min(job.cpu_s - cpu, job.wall_s - wall, SAMPLE_S))

    def end_all_of(self, server: Server) -> list[Job]:
        """End what runs and waits in `server`; the jobs that were running."""
        held: list[Job] = []
        for node in [*self.active, *self.live]:
            if node.server is server:
                if node.job is not None:
                    held.append(node.job)
                    node.job = None
                self.end(node)
        return held

    def sweep(self) -> None:
        """Kill processes below this one that no node accounts for: a child that never greeted.

        Those that cannot be told yet from a child about to greet, or a server's own, are left to the next sweep.
        """
        self.sweep_at = None
        parents = {pid: parent for pid, parent, _ in process_parents()}
        known, warming, mine = {*self.pids, self.owner.lane.pid}, set(), os.getpid()
        forking = {node.server.pid if node.parent is None else node.parent.pid for node in self.active if not node.pid}
        for server in self.owner.servers.values():
            if server.state is not ServerState.READY:
                warming.add(server.process.pid if server.process else 0)
                continue
            if self.owner.lane.starting:
                forking.add(server.pid)
            pid = server.pid
            while pid and pid != mine:
                known.add(pid)
                pid = parents.get(pid, 0)
        for pid in parents:
            line = [pid]
            while line[-1] and line[-1] != mine:
                line.append(parents.get(line[-1], 0))
            if pid in known or pid == mine or line[-1] != mine:
                continue
            if parents[pid] in forking or not warming.isdisjoint(line):
                self.sweep_at = time.monotonic() + SWEEP_S
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # It was one of those just killed, and is gone.
                continue
            self.owner.counts["strays"] += 1
