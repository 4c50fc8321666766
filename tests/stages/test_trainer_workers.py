"""How many trainers a run asks for, on clusters of every size."""

from dataclasses import replace

import pytest

from evolve.learn.jobs import Workers
from evolve.schema import ClusterConfig, EvolveConfig, SFTConfig
from evolve.stages import run

JOINED = EvolveConfig(cluster=ClusterConfig(address="10.0.0.1:6379"))
ALONE = EvolveConfig()


@pytest.fixture(params=[0, 1, 6, 8, 500])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(run.cluster, "may_grow", lambda config: config.address is not None)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(request.param)})
    return int(request.param)


def test_there_is_one_trainer_a_gpu_at_least_one_and_no_more_than_a_batch_has_items(gpus: int) -> None:
    config = replace(JOINED, sft=SFTConfig(batch=128), ppm=replace(JOINED.ppm, batch=96))
    assert run.trainer_workers(config, "gpu") == Workers(min(96, max(1, gpus)), True, 1.0)


def test_an_interrupted_training_goes_on_with_as_many_where_nodes_may_come(gpus: int) -> None:
    assert run.trainer_workers(JOINED, "gpu", 8).count == 8


def test_where_no_node_can_come_it_goes_on_with_as_many_if_they_are_there(gpus: int) -> None:
    assert run.trainer_workers(ALONE, "gpu", 8).count == (8 if gpus >= 8 else max(1, gpus))


def test_what_the_user_asks_for_counts_before_all_else(gpus: int) -> None:
    assert run.trainer_workers(replace(JOINED, sft=SFTConfig(workers=3)), "gpu", 8).count == 3


def test_on_cpus_there_are_two(gpus: int) -> None:
    assert run.trainer_workers(JOINED, "cpu") == Workers(2, False, 1.0)
