"""Asking every node of a running cluster: one probe a node, placed there and nowhere else; every wait is bounded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evolve.attach import LiveNode
from evolve.doctor.checks import Check, Status
from evolve.doctor.facts import Facts, Probe
from evolve.errors import StorageError
from evolve.files import Place
from evolve.remote import RemotePath

POLL_S = 1.0
SHARED = (
    "run.dir must be one directory for all nodes: a shared mount such as NFS, EFS or Lustre, or an object store that "
    "every node may read and write (cluster.yaml)"
)


CREDENTIALS = (
    "give the node credentials for the store (its role, its user's files, its environment), and the store's library: "
    "pip install s3fs, gcsfs or adlfs"
)


def wait_for(count: int, nodes: Callable[[], list[LiveNode]], timeout_s: float) -> list[LiveNode]:
    """The cluster's nodes, once there are `count` of them or the time is up."""
    deadline = time.monotonic() + timeout_s
    found = nodes()
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(POLL_S)
        found = nodes()
    return found


def joined(nodes: Sequence[LiveNode], expected: int | None, timeout_s: float) -> Check:
    """Whether as many nodes are there as were expected."""
    names = f"{len(nodes)}: " + ", ".join(node.name for node in nodes)
    if expected is None or len(nodes) >= expected:
        return Check("nodes", "cluster", Status.OK, names)
    what = f"{len(nodes)} of {expected} nodes have joined within {timeout_s:.0f} s: {names}"
    mend = (
        "on a node that is missing: does `ray start --address` run there, with the same Ray, Python and token, and "
        "does it reach the head's port? Its /tmp/ray/session_latest/logs/raylet.out says why"
    )
    return Check("nodes", "cluster", Status.FAIL, what, mend)


class Probes:
    """One `Probe` actor a node; ended by `close`."""

    def __init__(self, nodes: Sequence[LiveNode], timeout_s: float) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.nodes, self.timeout_s = list(nodes), timeout_s
        self.lost: list[Check] = []
        """A node that did not answer, once; it is not asked again."""
        remote: Any = ray.remote(Probe)
        self._actors = {
            node.id: remote.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote()
            for node in nodes
        }

    def ask(self, method: str, arguments: Callable[[LiveNode], tuple[Any, ...]]) -> dict[str, Any]:
        """Call a method on all nodes at once; answers by node id, without the nodes that gave none in time."""
        import ray

        refs = {node.id: getattr(self._actors[node.id], method).remote(*arguments(node)) for node in self.nodes}
        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=self.timeout_s)
        answers = {}
        for node in list(self.nodes):
            if refs[node.id] not in ready:
                self._lose(node, f"no answer to `{method}` within {self.timeout_s:.0f} s")
                continue
            try:
                answers[node.id] = ray.get(refs[node.id], timeout=self.timeout_s)
            except ray.exceptions.RayError as error:
                self._lose(node, str(error).strip().splitlines()[-1])
        return answers

    def _lose(self, node: LiveNode, why: str) -> None:
        mend = (
            "where evolve is not importable: run this through `ray job submit --working-dir .`; "
            "else look at /tmp/ray/session_latest/logs on that node"
        )
        self.lost.append(Check("node", node.name, Status.FAIL, why, mend))
        self.nodes.remove(node)

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)


def facts(probes: Probes, run_dir: Place) -> list[Facts]:
    """What is found on every node that answers."""
    found = probes.ask("facts", lambda node: (node.name, str(run_dir)))
    return [found[node.id] for node in probes.nodes]


def same_directory(probes: Probes | None, run_dir: Place) -> list[Check]:
    """Whether every node reads what this process writes into the run directory, and the other way round.

    `probes`: None asks only whether this process can write there.
    """
    token = uuid.uuid4().hex
    own, here = run_dir / f".doctor-{token}", Probe()
    made = [] if isinstance(run_dir, RemotePath) else [p for p in (run_dir, *run_dir.parents) if not p.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            if error := here.write(str(own), token):
                raise StorageError(error)
            if probes is None:
                return [Check("run directory", "this machine", Status.OK, str(run_dir))]
            return _seen_by_all(probes, run_dir, own, token)
        finally:
            own.unlink(missing_ok=True)
            for directory in made:
                directory.rmdir()
    except (OSError, StorageError) as error:
        mend = "choose a run.dir that can be written" if isinstance(run_dir, Path) else CREDENTIALS
        return [Check("run directory", "this machine", Status.FAIL, str(error), mend)]


def _seen_by_all(probes: Probes, run_dir: Place, own: Place, token: str) -> list[Check]:
    theirs = {node.id: own.with_name(f"{own.name}-{node.id[:12]}") for node in probes.nodes}
    try:
        read = probes.ask("read", lambda node: (str(own),))
        error = probes.ask("write", lambda node: (str(theirs[node.id]), node.id))
        here = Probe()
        return [
            directory_check(
                node,
                run_dir,
                reads=read[node.id] == token,
                error=error[node.id],
                is_read=not error[node.id] and here.read(str(theirs[node.id])) == node.id,
            )
            for node in probes.nodes
        ]
    finally:
        for path in theirs.values():
            path.unlink(missing_ok=True)


def directory_check(node: LiveNode, run_dir: Place, reads: bool, error: str, is_read: bool) -> Check:
    """One node's side of `same_directory`."""
    if not reads:
        what = f"{run_dir} is another directory there: a file written here does not appear"
        return Check("run directory", node.name, Status.FAIL, what, SHARED)
    if error:
        mend = "let the user that runs Ray there write to it" if isinstance(run_dir, Path) else CREDENTIALS
        return Check("run directory", node.name, Status.FAIL, f"{run_dir} cannot be written: {error}", mend)
    if not is_read:
        what = f"{run_dir}: a file written there does not appear here"
        return Check("run directory", node.name, Status.FAIL, what, SHARED)
    return Check("run directory", node.name, Status.OK, f"{run_dir}, the same one")


def connections(probes: Probes) -> list[Check]:
    """Whether nodes reach each other on ports the system chooses: each dials the next, in a ring."""
    ports = probes.ask("listen", lambda node: ())
    ring = probes.nodes
    after = {node.id: ring[(place + 1) % len(ring)] for place, node in enumerate(ring)}
    errors = probes.ask("dial", lambda node: (after[node.id].address, ports[after[node.id].id]))
    return [
        Check(
            "ports",
            node.name,
            Status.FAIL if errors[node.id] else Status.OK,
            f"cannot reach {after[node.id].name} at {after[node.id].address}: {errors[node.id]}"
            if errors[node.id]
            else "reaches the next node",
            "open all TCP ports between the nodes (trainers and engines choose theirs)" if errors[node.id] else "",
        )
        for node in probes.nodes
    ]
