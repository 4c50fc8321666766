"""Pretended machines: a Ray cluster of several nodes on this one, which outlives drivers and replaces nodes it loses.

python -m benchmarks.chaos --machines N FILE     writes the cluster's address to FILE, and stays until SIGTERM
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

CPUS, GPUS = 3, 1
"""Of each node. The GPUs are pretended, too; the driver under test serves no model on them."""
REPLACE_S = 2.0
"""Until a lost node is replaced, as an autoscaler would."""


def serve(count: int, file: Path) -> int:
    """Be the cluster: a head without resources and `count` nodes, until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    reset_ray_address()  # nobody else's `ray.init()` is to find it
    nodes = [cluster.add_node(num_cpus=CPUS, num_gpus=GPUS) for _ in range(count)]
    aside = file.with_suffix(".new")
    aside.write_text(cluster.address)
    aside.replace(file)
    try:
        while not ended.wait(0.5):
            for node in [node for node in nodes if not node.remaining_processes_alive()]:
                nodes.remove(node)
                cluster.remove_node(node, allow_graceful=False)
                time.sleep(REPLACE_S)
                nodes.append(cluster.add_node(num_cpus=CPUS, num_gpus=GPUS))
    finally:
        cluster.shutdown()
    return 0
