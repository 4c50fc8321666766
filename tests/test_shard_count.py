"""How many shards a run starts on the cluster it has joined."""

from __future__ import annotations

import pytest

from evolve.cluster import shard_count
from evolve.config import load
from evolve.service import ServiceError


def test_a_run_that_does_not_fit_its_cluster_is_refused_with_what_each_node_lacks(ray_cluster):
    config = load(["cluster.shards=2"])
    assert shard_count(config, {"CPU": 1.0}) == 2
    assert shard_count(load([]), {"CPU": 1.0}) == 1
    with pytest.raises(ServiceError, match=r"2 shard.* need 3 CPUs each .* room for 1\. .*: 2 CPUs short\. Add"):
        shard_count(config, {"CPU": 3.0})
    with pytest.raises(ServiceError, match="8 GPUs short"):
        shard_count(load([]), {"CPU": 1.0, "GPU": 8.0})
