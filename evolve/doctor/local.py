"""Checks of the process that drives a run: ports of this machine, Weights & Biases, token authentication."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from evolve.doctor.checks import Check, Status
from evolve.report import wandb_key
from evolve.schema import WandbConfig, WandbMode

HERE = "this machine"
RAY_PORTS = {6379: "--port", 8265: "--dashboard-port"}
"""What `ray start --head` listens on, and the option that moves it."""


def ports(used: Callable[[int], bool] | None = None) -> list[Check]:
    """Whether the ports of a Ray head are free. A run without a cluster needs none of them."""
    used = used or _used
    found = []
    for port, option in RAY_PORTS.items():
        if used(port):
            mend = f"a Ray cluster at work here? Name it: cluster.address=auto. Else: ray start --head {option}=N"
            found.append(Check("ports", HERE, Status.WARN, f"{port} is in use", mend))
    return found or [Check("ports", HERE, Status.OK, f"{', '.join(map(str, RAY_PORTS))} are free for ray start --head")]


def _used(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return True
    return False


def wandb(config: WandbConfig, key: bool | None = None, reaches: Callable[[str, int], bool] | None = None) -> Check:
    """What will become of the metrics. Tells whether there is a key, never the key."""
    key = wandb_key() if key is None else key
    mode = config.mode
    if mode is WandbMode.disabled:
        return Check("W&B", HERE, Status.OK, "disabled; metrics.jsonl has everything")
    if mode is WandbMode.offline or (mode is WandbMode.auto and not key):
        why = "as configured" if mode is WandbMode.offline else "there is no key"
        return Check("W&B", HERE, Status.OK, f"offline, {why}; `wandb sync` uploads later")
    if not key:
        mend = "wandb login, or WANDB_API_KEY, or wandb.mode=offline"
        return Check("W&B", HERE, Status.FAIL, "wandb.mode=online, but there is no key", mend)
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    if (reaches or _reaches)(host, port):
        return Check("W&B", HERE, Status.OK, f"online: a key, and {host} answers")
    mend = "open the way there, or wandb.mode=offline and `wandb sync` later"
    return Check("W&B", HERE, Status.FAIL, f"online is asked for, but {host}:{port} does not answer", mend)


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def token_authentication() -> Check:
    """Whether the cluster that this process has joined asks for a token. Without one anyone may run code on it."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return Check("authentication", "cluster", Status.OK, "by token")
    mend = "RAY_AUTH_MODE=token and the same ~/.ray/auth_token on all nodes, as cluster.yaml has it"
    what = "none: whoever reaches the head's ports can run code on every node"
    return Check("authentication", "cluster", Status.WARN, what, mend)


def placement(missing: Sequence[str], waits: Sequence[str] = ()) -> list[Check]:
    """What the plan says is missing, and what it `waits` for where nodes may be added."""
    if not missing and not waits:
        return [Check("placement", "cluster", Status.OK, "every stage fits")]
    mend = "add nodes, or another recipe (conf=quickstart needs no GPU); --plan shows the arithmetic"
    patience = "nothing, where the autoscaler has such nodes to add (max_workers and node types in cluster.yaml)"
    return [
        *(Check("placement", "cluster", Status.FAIL, line, mend) for line in missing),
        *(Check("placement", "cluster", Status.WARN, f"waits for nodes: {line}", patience) for line in waits),
    ]
