"""Where the parts of a run go: what each node has room for, and what it lacks. Starts nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

_DUST = 1e-9
"""Shares of a GPU are fractions: 3 x 0.3 may not come to more than 0.9 of one."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    cpus: float
    gpus: float = 0.0
    name: str = "this machine"


@dataclass(frozen=True)
class Resources:
    """The machines there are."""

    nodes: tuple[Node, ...]
    grows: bool = False
    """Whether an autoscaler may add others."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


@dataclass(frozen=True)
class Need:
    """What one group of actors takes of one node: a shard, or a trainer worker."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Share:
    """What one node takes of a layout."""

    node: Node
    groups: int
    short: Need
    """What the node lacks for one group more."""


@dataclass(frozen=True)
class Layout:
    """All groups of one kind over the nodes. Ray decides among nodes with room; the counts are what it can reach."""

    what: str
    """What is placed: `rounds 3-4`, `training`."""
    need: Need
    wanted: int
    """How many groups there must be; at least 1."""
    shares: tuple[Share, ...]

    @property
    def placed(self) -> int:
        return sum(share.groups for share in self.shares)

    @property
    def complete(self) -> bool:
        return self.placed >= self.wanted


def local_resources() -> Resources:
    """This machine, found without importing torch: GPUs as `nvidia-smi` lists them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
        gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    except (OSError, subprocess.SubprocessError):
        gpus = 0  # no driver: no GPU that could be used
    if visible is not None:
        gpus = min(gpus, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return Resources((Node(float(len(os.sched_getaffinity(0))), float(gpus)),))


def room(node: Node, need: Need) -> int:
    """How many groups a node holds at once."""
    fits = [int((has + _DUST) // takes) for has, takes in ((node.cpus, need.cpus), (node.gpus, need.gpus)) if takes > 0]
    return min(fits, default=1)


def lay_out(what: str, nodes: Sequence[Node], need: Need, wanted: int | None, most_a_node: int | None = None) -> Layout:
    """Place groups on nodes, in the nodes' order.

    Args:
        wanted: how many groups; None: as many as fit, and at least one.
        most_a_node: a bound beside the node's resources.
    """
    left = wanted
    shares = []
    for node in nodes:
        groups = room(node, need)
        groups = min(groups, *(bound for bound in (most_a_node, left) if bound is not None), groups)
        if left is not None:
            left -= groups
        rest = taken(node, need, groups)
        short = Need(max(0.0, need.cpus - rest.cpus), max(0.0, need.gpus - rest.gpus))
        shares.append(Share(node, groups, short))
    return Layout(what, need, 1 if wanted is None else wanted, tuple(shares))


def shards(what: str, nodes: Sequence[Node], need: Need, wanted: int | None) -> Layout:
    """Where a run's engine groups go: `cluster.shards` of them, else as many as fit.

    Without GPUs one engine uses all cores of a node, so that more than one a node must be asked for.
    """
    return lay_out(what, nodes, need, wanted, None if need.gpus or wanted else 1)


def taken(node: Node, need: Need, groups: int) -> Node:
    """A node without what `groups` groups take of it."""
    return replace(node, cpus=node.cpus - groups * need.cpus, gpus=node.gpus - groups * need.gpus)


def amount(need: Need) -> str:
    """`2 CPUs and 1 GPU`; what is not needed is left out."""
    parts = [
        f"{count:.3g} {noun}" + ("" if count == 1 else "s")
        for count, noun in ((need.cpus, "CPU"), (need.gpus, "GPU"))
        if count > _DUST
    ]
    return " and ".join(parts) or "nothing"


def listed(names: Sequence[str], shown: int) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def shortfalls(layout: Layout, shown: int = 6) -> list[str]:
    """What is missing, node by node, for one group more; nodes that lack the same share a line."""
    by_lack: dict[str, list[str]] = {}
    for share in layout.shares:
        by_lack.setdefault(amount(share.short), []).append(share.node.name)
    return [f"{listed(names, shown)}: {lack} short" for lack, names in by_lack.items()]
