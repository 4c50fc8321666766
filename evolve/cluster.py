"""The Ray cluster a run is in: connecting to it, and what its nodes have room for."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get

from evolve.attach import address_of, join, live_nodes
from evolve.placement import Layout, Need, Node, amount, shards, shortfalls
from evolve.schema import ClusterConfig, Device, EngineConfig, EvolveConfig
from evolve.service import ServiceError

LOCAL_CPUS = 4
"""Logical CPUs of a local cluster at least: enough slots for every role, whatever the machine has."""
LOCAL_PROCESSES = 32
"""Processes of a local cluster, about twice what a run on one machine has."""
STARTS = 3
"""Attempts to start a local cluster."""
CONNECTION_S = 1.0
"""How long a head that lives may take to accept a connection."""


def connect(config: ClusterConfig) -> str:
    """Join the cluster this process belongs to, or start a local one; returns the device, `cpu` or `gpu`.

    Raises:
        UnreachableError: no cluster answers at the address there is.
        ServiceError: GPUs are asked for and the cluster has none; or a local cluster does not start.
    """
    address = address_of(config)
    if not ray.is_initialized():
        if address:
            join(address)
        else:
            _start_local()
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.device is Device.gpu and not gpus and not may_grow(config):
        where = "the cluster" if address else "this machine"
        raise ServiceError(
            f"cluster.device=gpu, but {where} has no GPU. Join a cluster with GPU nodes (cluster.address, README), "
            "or use cluster.device=auto or a CPU recipe (conf=quickstart)."
        )
    return "gpu" if config.device is Device.gpu or (gpus and config.device is Device.auto) else "cpu"


def _start_local() -> None:
    """A Ray of this process' own. On a machine that is very busy its start can take longer than Ray waits for it."""
    cpus = max(LOCAL_CPUS, os.cpu_count() or 1)
    # Most actors wait more than they compute; Ray takes that many processes on few cores for a mistake.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(LOCAL_PROCESSES))
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(address="local", num_cpus=cpus, **settings)
            return
        except Exception as error:  # Ray has no type of its own for this
            ray.shutdown()
            if attempt == STARTS:
                raise ServiceError(
                    f"Ray did not start on this machine in {STARTS} attempts: {error} Is it very busy, or short of "
                    f"memory or of space in /dev/shm? Ray's own logs are below /tmp/ray/session_latest/logs."
                ) from error


def dead_daemons() -> list[str]:
    """What has died of the Ray that this process has started; nothing of a cluster that it has joined."""
    node: Any = ray._private.worker._global_node
    if node is None or not node.head:
        return []
    return [kind for kind, _ in node.dead_processes() if kind in ("gcs_server", "raylet")]


def joined_head() -> tuple[str, int] | None:
    """Where the head of the cluster that this process has joined listens; None where it has started a Ray itself."""
    node: Any = ray._private.worker._global_node
    if node is None or node.head:
        return None
    host, _, port = node.gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def answers(head: tuple[str, int]) -> bool:
    """Whether a head accepts a connection."""
    try:
        socket.create_connection(head, timeout=CONNECTION_S).close()
    except OSError:
        return False
    return True


def bundle(config: EvolveConfig, engine: EngineConfig, device: str, ppm: bool) -> dict[str, float]:
    """What one shard takes of its node: CPUs for its verifier, GPUs for its engines.

    On CPUs engines reserve none: they stay up beside the trainers, and reservations only order who may start.
    """
    if device == "cpu":
        return {"CPU": config.cluster.verifier_cpus}
    gpus = engine.gpus + (config.ppm.engine.gpus if ppm else 0.0)
    return {"CPU": config.cluster.verifier_cpus, "GPU": gpus}


def may_grow(config: ClusterConfig) -> bool:
    """Whether nodes may be added: never to this machine, and not to a cluster that is known to have no autoscaler."""
    return address_of(config) is not None and not _watched_only()


def _watched_only() -> bool:
    """Whether the monitor of the joined cluster only looks on, as it does where it was given no autoscaler to run: then
    it reports each node as a type of its own, named after it. False where it has not reported yet, and for autoscaler
    v2, whose reports do not tell; `ray start` by itself has v1.
    """
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
    types = report.get("active_nodes") or {}
    return bool(types) and all(re.fullmatch("node_[0-9a-f]{56}", name) for name in types)


def shard_count(config: EvolveConfig, need: Mapping[str, float]) -> int:
    """How many shards to wait for before work begins: those there is room for now, at least one.

    Raises:
        ServiceError: no node can come, and not even one fits, or, on this machine alone, fewer than `cluster.shards`;
            the message says what each node lacks.
    """
    found = layout(config, need, alive_nodes().values())
    if found.complete or (found.placed and address_of(config.cluster)):
        return found.placed
    if may_grow(config.cluster):
        return 1
    raise ServiceError(
        f"{found.wanted} shard(s) need {amount(found.need)} each on one node; {len(found.shares)} node(s) have "
        f"room for {found.placed}. {'; '.join(shortfalls(found))}. Add nodes, or lower cluster.shards, "
        f"cluster.verifier_cpus or the engines' gpus."
    )


def layout(config: EvolveConfig, need: Mapping[str, float], nodes: Iterable[Node]) -> Layout:
    """Where `cluster.shards` shards, or as many as fit, would go on these nodes."""
    return shards("shards", list(nodes), Need(need["CPU"], need.get("GPU", 0.0)), config.cluster.shards)


def alive_nodes() -> dict[str, Node]:
    """Every living node by Ray's id for it; nodes that are being drained are left out."""
    draining = ray._private.state.state.get_draining_nodes()
    return {node.id: Node(node.cpus, node.gpus, node.name) for node in live_nodes() if node.id not in draining}


def largest_free(need: Mapping[str, float]) -> dict[str, float]:
    """The most of each resource that is free on one node."""
    free = ray._private.state.available_resources_per_node().values()
    return {kind: max((node.get(kind, 0.0) for node in free), default=0.0) for kind in need}
