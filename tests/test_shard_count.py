"""How many shards a run starts on the cluster it has joined, and whether it waits for nodes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import ray

from evolve import cluster
from evolve.cluster import connect, may_grow, shard_count
from evolve.config import load
from evolve.schema import ClusterConfig, Device
from evolve.service import ServiceError


def test_a_run_that_does_not_fit_its_cluster_is_refused_with_what_each_node_lacks(ray_cluster):
    config = load(["cluster.shards=2"])
    assert shard_count(config, {"CPU": 1.0}) == 2
    assert shard_count(load([]), {"CPU": 1.0}) == 1
    with pytest.raises(ServiceError, match=r"2 shard.* need 3 CPUs each .* room for 1\. .*: 2 CPUs short\. Add"):
        shard_count(config, {"CPU": 3.0})
    with pytest.raises(ServiceError, match="8 GPUs short"):
        shard_count(load([]), {"CPU": 1.0, "GPU": 8.0})


def test_a_joined_cluster_without_an_autoscaler_is_not_waited_for_where_nothing_fits(ray_cluster):
    address = ray.get_runtime_context().gcs_address
    joined = ClusterConfig(address=address, device=Device.gpu)
    deadline = time.monotonic() + 60
    while may_grow(joined):  # until Ray's monitor has reported
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(ServiceError, match="the cluster has no GPU"):
        connect(joined)
    config = load(["cluster.shards=2", f"cluster.address={address}"])
    assert shard_count(config, {"CPU": 3.0}) == 1, "work begins with those there is room for"
    with pytest.raises(ServiceError, match=r"2 shard.* need 5 CPUs each .* room for 0\. .*: 1 CPU short"):
        shard_count(config, {"CPU": 5.0})


@pytest.mark.parametrize(
    "report",
    [
        None,
        {"load_metrics_report": {}},
        {"autoscaler_report": {"active_nodes": {}}},
        {"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}},
        {"autoscaler_report": {"active_nodes": {"node_a100": 2}}},
    ],
    ids=["silent", "not yet", "no node yet", "head alone", "a type of a like name"],
)
def test_nodes_are_waited_for_where_an_autoscaler_may_add_them(
    ray_cluster, monkeypatch: pytest.MonkeyPatch, report: Any
):
    monkeypatch.setattr(cluster, "_internal_kv_get", lambda key: report and json.dumps(report).encode())
    config = load(["cluster.address=auto"])
    assert shard_count(config, {"CPU": 1.0, "GPU": 8.0}) == 1
