"""Joining a Ray cluster that is already running: nothing is started, and every wait is bounded."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evolve.errors import EvolveError
from evolve.schema import ClusterConfig

ANSWER_S = 10.0
"""How long an address may take to accept a connection. What accepts one and is no Ray costs 40 s more, which is what
Ray waits once; by itself it tries twenty times."""


class UnreachableError(EvolveError):
    """No Ray cluster answers at an address; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LiveNode:
    """A node of a running cluster, as Ray knows it."""

    id: str
    name: str
    """Its host name, with the end of its id where several nodes have the same."""
    address: str
    cpus: float
    gpus: float


def address_of(config: ClusterConfig) -> str | None:
    """The address of the cluster that a configuration would run in; None: a new one on this machine."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def attached(address: str) -> Iterator[Callable[[], list[LiveNode]]]:
    """Join the cluster at `address` and yield what lists its living nodes; a connection to it from before stays.

    Raises:
        UnreachableError: no cluster answers there, or it refuses this process.
    """
    import ray

    if ray.is_initialized() and address in ("auto", ray.get_runtime_context().gcs_address):
        yield live_nodes
        return
    join(address)
    try:
        yield live_nodes
    finally:
        ray.shutdown()


def join(address: str) -> None:
    """Make this process part of the cluster at `address`.

    Raises:
        UnreachableError: no cluster answers there, or it refuses this process.
    """
    import ray

    try:
        if address.rpartition(":")[2].isdecimal():
            _try_out(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UnreachableError(
            f'no Ray cluster answers at {address} ({str(error).splitlines()[0]}). Start it (README, "On a cluster"), '
            f"or leave the address out.{_token_hint()}"
        ) from error


def _try_out(address: str) -> None:
    """One connection and one question, as `ray.init` begins too."""
    import ray
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.services import canonicalize_bootstrap_address

    scheme, _, place = address.rpartition("://")
    target = place if scheme else str(canonicalize_bootstrap_address(address))
    host, _, port = target.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    if not scheme:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # else the next line aborts the process
        raylet: Any = ray._raylet
        raylet.GcsClient(address=target)


def _token_hint() -> str:
    """What to look at when the cluster wants a token; never the token itself."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return ""
    return (
        " If it was started with token authentication, set RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token."
    )


def live_nodes() -> list[LiveNode]:
    """The living nodes of the cluster that this process has joined; those with most GPUs last."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    found = []
    for node, host in zip(alive, hosts, strict=True):
        name = host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}"
        has = node["Resources"]
        address = node["NodeManagerAddress"]
        found.append(LiveNode(node["NodeID"], name, address, has.get("CPU", 0.0), has.get("GPU", 0.0)))
    return sorted(found, key=lambda node: (node.gpus, node.name))
