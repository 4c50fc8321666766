"""Shards that an autoscaler adds nodes for: Ray's own, with its provider of pretended nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evolve.cluster import answers
from tests.jobs.test_submit import BIN, ROOT, free_ports, switch_off

HEAD_ID = "f" * 51 + "00000"
"""What Ray's pretended provider calls the head."""

SCRIPT = """
import json, sys, time
from pathlib import Path

import ray

from evolve import cluster
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.schema import ClusterConfig, EvolveConfig, VerifierConfig
from tests.doubles import DoublePolicy, DoublePPM
from tests.stages.test_growing import PROBLEMS, grow

directory = Path(sys.argv[1])
settings = ClusterConfig(address=sys.argv[2], shards=2, verifier_cpus=2.0)
cluster.connect(settings)
waited = []
fleet = Fleet(
    EvolveConfig(cluster=settings, verifier=VerifierConfig(supervisors=1)), "cpu", Engines(DoublePolicy, DoublePPM),
    on_wait=waited.append,
)
(directory / "model").mkdir()
nodes = len(cluster.alive_nodes())
fleet.load(Checkpoint(str(directory / "model"), "digest"), None)
told = {"nodes": nodes, "waited": waited, "began with": len(fleet.groups), "events": list(fleet.events)}


def until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, (fleet._lacking(), cluster.alive_nodes())
        fleet.poll()
        time.sleep(0.1)


until(lambda: len(fleet.groups) == 2)
told["places"] = [group.node for group in fleet.groups]
told["trees"], told["expected"] = len(grow(fleet, directory / "trees")), len(PROBLEMS)
fleet.stop()
until(lambda: len(cluster.alive_nodes()) == nodes)
(directory / "told.json").write_text(json.dumps(told))
ray.shutdown()
"""


@pytest.fixture
def address() -> Iterator[str]:
    """A head without resources, whose autoscaler has up to two nodes of 2 CPUs to add."""
    with tempfile.TemporaryDirectory(prefix="evolve-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        gcs, client, agent, agent_grpc, metrics = free_ports(5)
        node = {"node_config": {}, "min_workers": 0}
        config = {
            "cluster_name": "pretended",
            "max_workers": 2,
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "fake_multinode", "gcs_address": f"127.0.0.1:{gcs}", "launch_multiple": True,
                "head_node_id": HEAD_ID,
            },
            "auth": {},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {**node, "resources": {"CPU": 2, "object_store_memory": 10**8}, "max_workers": 2},
            },
        }  # fmt: skip
        (directory / "autoscaling.json").write_text(json.dumps(config))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
                    *("--num-cpus=0", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"),
                    *("--include-dashboard=false", f"--ray-client-server-port={client}"),
                    *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
                    *(f"--metrics-export-port={metrics}", f"--temp-dir={directory / 'ray'}"),
                    f"--autoscaling-config={directory / 'autoscaling.json'}",
                ],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not answers(("127.0.0.1", gcs)):
                assert time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{gcs}"
        finally:
            switch_off(process)


def test_nodes_are_added_for_the_shards_asked_for_and_go_when_the_shards_have_ended(
    address: str, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), address],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["nodes"] == 1, "the head alone"
    assert any("shard-0, shard-1: 2 CPUs needed on one node, where at most 0 CPU are free" in w for w in told["waited"])
    assert told["began with"] >= 1
    assert len(set(told["places"])) == 2
    assert told["trees"] == told["expected"]
