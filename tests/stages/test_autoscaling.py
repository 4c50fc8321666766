"""Shards that an autoscaler adds nodes for: Ray's own, with its provider of pretended nodes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml

from evolve.cluster import answers
from tests.jobs.test_submit import BIN, free_ports, switch_off
from tests.scripts import told_by

HEAD_ID = "f" * 51 + "00000"
"""What Ray's pretended provider calls the head."""

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

SCRIPT = """
import json, sys, time
from pathlib import Path

import ray

from evolve import cluster
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.schema import ClusterConfig, Device, EvolveConfig, VerifierConfig
from tests.doubles import DoublePolicy, DoublePPM
from tests.stages.test_growing import PROBLEMS, grow

directory = Path(sys.argv[1])
settings = ClusterConfig(address=sys.argv[2], device=Device.gpu, verifier_cpus=1.0)
device = cluster.connect(settings)
fleet = Fleet(
    EvolveConfig(cluster=settings, verifier=VerifierConfig(supervisors=1)), device, Engines(DoublePolicy, DoublePPM)
)
(directory / "model").mkdir()
nodes = len(cluster.alive_nodes())
fleet.load(Checkpoint(str(directory / "model"), "digest"), None)
told = {"nodes": nodes, "began with": len(fleet.groups)}
told["trees"], told["expected"] = len(grow(fleet, directory / "trees")), len(PROBLEMS)


def until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, (fleet._lacking(), cluster.alive_nodes())
        fleet.poll()
        time.sleep(0.1)


until(lambda: len(fleet.groups) == 2)
told["places"] = [group.node for group in fleet.groups]
fleet.stop()
until(lambda: len(cluster.alive_nodes()) == nodes)
(directory / "told.json").write_text(json.dumps(told))
ray.shutdown()
"""


@pytest.fixture
def address() -> Iterator[str]:
    """A head without resources, whose autoscaler may add two nodes with a pretended GPU each."""
    with tempfile.TemporaryDirectory(prefix="evolve-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        gcs, client, agent, agent_grpc, metrics = free_ports(5)
        node = {"node_config": {}, "min_workers": 0}
        defaults = Path(ray.__file__).parent / "autoscaler" / "local" / "defaults.yaml"
        config = yaml.safe_load(defaults.read_text()) | {
            "cluster_name": "pretended",
            "max_workers": 2,
            "idle_timeout_minutes": 0.05,
            "provider": {
                # Ray's own name for it wants a file that its package lacks.
                "type": "external", "module": PROVIDER,
                "gcs_address": f"127.0.0.1:{gcs}", "launch_multiple": True,
                "head_node_id": HEAD_ID,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {**node, "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8}, "max_workers": 2},
            },
        }  # fmt: skip
        (directory / "autoscaling.json").write_text(json.dumps(config))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
            "RAY_AUTH_MODE": "disabled", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
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


def test_nodes_are_added_for_shards_work_begins_with_the_first_and_nodes_go_when_it_has_ended(
    address: str, tmp_path: Path
) -> None:
    told = told_by(SCRIPT, tmp_path, address, timeout_s=500.0, RAY_AUTH_MODE="disabled")
    assert told["nodes"] == 1, "the head alone"
    assert told["began with"] == 1
    assert told["trees"] == told["expected"]
    assert len(set(told["places"])) == 2, "with one at work another is asked for"
