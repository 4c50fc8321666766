"""A node that Ray drains, as an autoscaler or a cloud that takes it back has it do: its shard stops in good order."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from evolve import fleet as module
from evolve.config import load
from evolve.fleet import LEAVE_S, Fleet, Group
from tests.scripts import told_by

SCRIPT = """
import asyncio, json, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from evolve import fleet as module
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.schema import ClusterConfig, EvolveConfig, VerifierConfig
from tests.doubles import DoublePolicy, DoublePPM
from tests.stages.test_growing import PROBLEMS, grow


class Slow(DoublePolicy):
    "So that trees still grow on the node when it goes."

    async def propose(self, *arguments):
        await asyncio.sleep(0.2)
        return await DoublePolicy.propose(self, *arguments)


module.ROOM_S = 0.1
directory = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1)
cluster.connect()
config = EvolveConfig(cluster=ClusterConfig(verifier_cpus=1.0), verifier=VerifierConfig(supervisors=1))
fleet = Fleet(config, "cpu", Engines(Slow, DoublePPM))
(directory / "model").mkdir()
fleet.load(Checkpoint(str(directory / "model"), "digest"), None)
told = {"began with": [group.name for group in fleet.groups], "expected": len(PROBLEMS)}


def drain(growing):
    "The node of a shard that has finished trees which are in no part yet."
    owners = growing._board.__ray_call__.remote(lambda board: [live.shard for live in board._live.values()])
    told["drained"] = ray.get(owners, timeout=60)[0]
    [node] = [group.node for group in fleet.groups if group.name == told["drained"]]
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 3600) * 1000)
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(node, reason, "a test", deadline)
    assert accepted, why


told["trees"] = len(grow(fleet, directory / "trees", drain))
told["parts"] = [path.name for path in (directory / "trees").iterdir()]
told["ended with"] = [group.name for group in fleet.groups]
told["events"] = fleet.events
(directory / "told.json").write_text(json.dumps(told))
fleet.stop()
ray.shutdown()
cluster.shutdown()
"""


def test_a_drained_nodes_shard_makes_its_finished_trees_durable_and_another_grows_the_rest(tmp_path: Path) -> None:
    told = told_by(SCRIPT, tmp_path)
    drained = told["drained"]
    [kept] = [name for name in told["began with"] if name != drained]
    assert told["trees"] == told["expected"]
    assert any(event.endswith(f"is being drained: {drained} stops") for event in told["events"])
    assert not any("is gone" in event for event in told["events"])
    assert any(name.startswith(f"part-{drained}-") for name in told["parts"]), told["parts"]
    assert any(name.startswith(f"part-{kept}-") for name in told["parts"]), told["parts"]
    assert told["ended with"] == [kept]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors and placements that were ended of a Ray that is pretended, with one living node, `draining`."""
    ended: list[Any] = []
    monkeypatch.setattr(module, "ray", SimpleNamespace(kill=ended.append))
    monkeypatch.setattr(module, "remove_placement_group", ended.append)
    monkeypatch.setattr(module, "live_nodes", lambda: [SimpleNamespace(id="draining")])
    return ended


def test_a_shard_on_a_draining_node_is_told_to_stop_and_has_its_time_and_on_a_lost_one_it_is_ended(
    ended: list[Any],
) -> None:
    fleet = Fleet(load([]), "cpu")
    going, lost = (Group(f"on {node}", MagicMock(), node, shard=MagicMock()) for node in ("draining", "lost"))
    fleet.groups = [going, lost]
    fleet._drop_lost({}, 100.0)
    assert fleet.groups == []
    assert fleet.events == [
        "node draining is being drained: on draining stops", "node lost is gone, and on lost with it",
    ]  # fmt: skip
    assert going.shard.stop.remote.called
    assert not lost.shard.stop.remote.called
    assert ended == [lost.shard, lost.placement]
    fleet._let_go(100.0 + LEAVE_S)
    assert going.shard not in ended
    fleet._let_go(101.0 + LEAVE_S)
    assert ended[2:] == [going.shard, going.placement]
