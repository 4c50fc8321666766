"""Trainers on several nodes, which are raylets on one machine: nodes that share nothing but an object store, and one
that is lost."""

from pathlib import Path

import pytest

from tests.object_store.use import objects_at
from tests.scripts import told_by

SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evolve.files import place, publish_directory
from evolve.learn import rows
from evolve.learn.jobs import TrainJob, Workers
from evolve.learn.trainer import TrainerGroup
from evolve.policy.checkpoint import digest, resolve
from evolve.schema import Precision, SFTConfig
from tests.learn.conftest import make_trajectories, save_tiny_model

directory, store = Path(sys.argv[1]), place(sys.argv[2])
os.environ["EVOLVE_CACHE"] = str(directory / "driver")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = {name: cluster.add_node(num_cpus=1, env_vars={"EVOLVE_CACHE": str(directory / name)}) for name in "ab"}
cluster.connect()
publish_directory(save_tiny_model(directory / "model"), store / "base")
rows.write(rows.to_table(make_trajectories(22)), store / "rows.parquet")
config = SFTConfig(
    epochs=2, batch=8, zero_stage=1, precision=Precision.fp32, max_length=64, rows_tokens=128, learning_rate=1e-3,
    timeout_s=300.0, checkpoint_steps=2, cpus_per_worker=1.0,
)
job = TrainJob(
    config, str(store / "base"), (str(store / "rows.parquet"),), str(store / "first" / "checkpoint"),
    metrics=str(store / "first" / "metrics.jsonl"),
)
order = Path(os.environ["OBJECTS_KILL"])
order.write_text("*checkpoint.partial/checkpoint-4/published.json")
with TrainerGroup(Workers(2), store / "trainer") as group:
    [killed] = group.fit([job])
    told = {"killed": not order.exists()}
    [whole] = group.fit([replace(job, output=str(store / "second" / "checkpoint"), metrics=None)])


@ray.remote(num_cpus=0)
def served(address):
    path = resolve(address)
    return path, digest(path)


def on(node):
    return served.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))


told["resumed from"] = killed.metrics["resumed_from"]
told["losses"] = [killed.metrics["loss"], whole.metrics["loss"]]
told["digest"] = digest(killed.output)
told["served"] = {name: ray.get(on(node).remote(killed.output), timeout=60) for name, node in nodes.items()}
told["lines"] = [json.loads(line)["step"] for line in place(job.metrics).read_text().splitlines()]
told["left"] = [str(path) for path in (store / "first").glob("*")]
(directory / "told.json").write_text(json.dumps(told))
ray.shutdown()
cluster.shutdown()
"""


def test_a_training_on_two_nodes_goes_on_from_a_checkpoint_that_only_the_store_has_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = objects_at(tmp_path / "bucket", monkeypatch)
    told = told_by(SCRIPT, tmp_path, str(store), timeout_s=900.0, OBJECTS_KILL=str(tmp_path / "kill"))
    assert told["killed"], "the first worker died after the shares of a checkpoint were put, before it counted"
    assert told["resumed from"] == 2
    assert told["losses"][0] == pytest.approx(told["losses"][1], abs=1e-5)
    assert [told["served"][name][1] for name in "ab"] == [told["digest"]] * 2
    for name in "ab":
        assert told["served"][name][0].startswith(str(tmp_path / name)), "each node has a copy of its own"
    assert set(told["lines"]) == {1, 2, 3, 4, 5, 6}
    assert sorted(path.rpartition("/")[2] for path in told["left"]) == ["checkpoint", "metrics.jsonl"]


LOSING = """
import json, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from evolve.learn import rows
from evolve.learn.errors import TrainingTimeoutError
from evolve.learn.jobs import TrainJob, Workers
from evolve.learn.trainer import TrainerGroup
from evolve.schema import Precision, SFTConfig
from tests.learn.conftest import make_trajectories, save_tiny_model

directory = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
kept, lost = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
cluster.connect()
save_tiny_model(directory / "model")
rows.write(rows.to_table(make_trajectories(22)), directory / "rows.parquet")
config = SFTConfig(
    epochs=5000, batch=8, zero_stage=1, precision=Precision.fp32, max_length=64, rows_tokens=128, timeout_s=3000.0,
)
job = TrainJob(config, str(directory / "model"), (str(directory / "rows.parquet"),), str(directory / "checkpoint"))
group = TrainerGroup(Workers(2), directory / "trainer")
told = {}


def lose(job, metrics):
    if "lost" not in told:
        told["lost"] = time.monotonic()
        group._start_timeout_s = 10.0
        cluster.remove_node(lost)


try:
    group.fit([job], lose)
except TrainingTimeoutError as error:
    told["error"], told["after"] = str(error), time.monotonic() - told["lost"]
(directory / "told.json").write_text(json.dumps(told))
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_that_nothing_replaces_is_an_error_soon_that_says_how_many_workers_are_missing(
    tmp_path: Path,
) -> None:
    told = told_by(LOSING, tmp_path, timeout_s=900.0)
    assert "0 of its 2 workers (1 CPUs each) have started within 10 s, 2 are missing" in told["error"]
    assert told["after"] < 600, "long before the training's own limit"
