"""Nodes that come and go during a search: several raylets on one machine, in a process of their own."""

from pathlib import Path

from tests.scripts import told_by

SCRIPT = """
import json, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.schema import ClusterConfig, EvolveConfig, VerifierConfig
from tests.doubles import DoublePolicy, DoublePPM
from tests.stages.test_growing import PROBLEMS, grow

directory = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
kept, lost = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
cluster.connect()
config = EvolveConfig(cluster=ClusterConfig(verifier_cpus=1.0), verifier=VerifierConfig(supervisors=1))
fleet = Fleet(config, "cpu", Engines(DoublePolicy, DoublePPM))
(directory / "model").mkdir()
fleet.load(Checkpoint(str(directory / "model"), "digest"), None)
told = {"began with": [group.name for group in fleet.groups]}


def lose(growing):
    cluster.remove_node(lost)
    cluster.add_node(num_cpus=1)


told["trees"] = len(grow(fleet, directory / "trees", lose))
deadline = time.monotonic() + 240
while len(fleet.groups) < 2 and time.monotonic() < deadline:
    fleet.poll()
    time.sleep(0.1)
told["ended with"] = [group.name for group in fleet.groups]
told["events"] = fleet.events
told["expected"] = len(PROBLEMS)
(directory / "told.json").write_text(json.dumps(told))
fleet.stop()
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_nodes_trees_are_grown_elsewhere_and_a_node_that_arrives_gets_a_shard(tmp_path: Path) -> None:
    told = told_by(SCRIPT, tmp_path)
    assert told["began with"] == ["shard-0", "shard-1"]
    assert told["trees"] == told["expected"]
    assert len(told["ended with"]) == 2
    assert "shard-2" in told["ended with"]
    assert any("is gone, and shard-" in event for event in told["events"])
    assert any(event.startswith("shard-2 is at work") for event in told["events"])
