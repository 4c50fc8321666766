"""Shards of a run, with doubles for the engines: they start, die, come back within limits, and are given up."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evolve.cluster import alive_nodes
from evolve.errors import EvolveError
from evolve.fleet import Checkpoint, Engines, Fleet
from evolve.placement import Node
from evolve.schema import ClusterConfig, EngineConfig, EvolveConfig, VerifierConfig
from evolve.watch import Exhausted
from tests.doubles import DoublePolicy, DoublePPM

pytestmark = pytest.mark.usefixtures("ray_cluster")

POLICY, PPM = "policy engine of shard-0", "PPM engine of shard-0"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    cluster = ClusterConfig(shards=1, verifier_cpus=0.5, restarts=1, restart_window_s=600.0)
    config = EvolveConfig(cluster=cluster, verifier=VerifierConfig(supervisors=1))
    made = Fleet(config, "cpu", Engines(DoublePolicy, DoublePPM))
    yield made
    made.stop()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    def make(name: str) -> Checkpoint:
        (tmp_path / name).mkdir()
        return Checkpoint(str(tmp_path / name), f"digest of {name}")

    return make


def until(fleet: Fleet, true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, fleet.watch.unhealthy()
        fleet.poll()
        time.sleep(0.05)


def serving(fleet: Fleet, role: str = "policy") -> str:
    import ray

    return ray.get(getattr(fleet.groups[0], role).pulse.remote(), timeout=60).serving


def test_weights_are_swapped_in_place_and_a_ppm_joins_later(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint]
) -> None:
    first, second, ppm = map(checkpoint, ("first", "second", "ppm"))
    fleet.load(first, None)
    before = fleet.watch.pids()[POLICY]
    fleet.load(second, ppm)
    assert fleet.watch.pids()[POLICY] == before
    assert (serving(fleet), serving(fleet, "ppm")) == (second.digest, ppm.digest)
    assert fleet.watch.unhealthy() == {}


def test_a_killed_engine_comes_back_with_the_checkpoint_it_must_serve_and_too_many_deaths_stop_the_run(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint]
) -> None:
    fleet.load(checkpoint("first"), None)
    second = checkpoint("second")
    fleet.load(second, None)
    before = fleet.watch.pids()[POLICY]
    os.kill(before, signal.SIGKILL)
    until(fleet, lambda: fleet.watch.pids()[POLICY] != before and not fleet.watch.unhealthy())
    assert serving(fleet) == second.digest, "not the checkpoint it was first made with"
    name, reason, seconds = fleet.watch.recoveries[-1]
    assert name == POLICY
    assert reason
    assert 0 < seconds < 120
    os.kill(fleet.watch.pids()[POLICY], signal.SIGKILL)
    with pytest.raises(Exhausted, match=r"policy engine of shard-0 died 2 times; 1 times within 600 s") as stopped:
        until(fleet, lambda: False)
    assert "s ago:" in str(stopped.value)
    assert "last lines of" in str(stopped.value)


def test_an_engine_that_cannot_be_started_is_tried_again_within_limits(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint]
) -> None:
    ill = checkpoint("ill")
    (Path(ill.path) / "fail").touch()
    with pytest.raises(Exhausted, match="no memory left"):
        fleet.load(ill, None)


def test_an_engine_that_crashes_while_it_starts_is_tried_again_within_limits(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint]
) -> None:
    ill = checkpoint("ill")
    (Path(ill.path) / "crash").touch()
    with pytest.raises(Exhausted, match="died 2 times"):
        fleet.load(ill, None)


def test_a_checkpoint_that_is_not_the_expected_one_is_not_tried_again(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint]
) -> None:
    ill = checkpoint("ill")
    (Path(ill.path) / "refuse").touch()
    with pytest.raises(EvolveError, match="policy engine of shard-0 cannot start: the checkpoint is another one"):
        fleet.load(ill, None)


def test_a_dead_shard_actor_is_replaced(fleet: Fleet, checkpoint: Callable[[str], Checkpoint]) -> None:
    import ray

    fleet.load(checkpoint("first"), None)
    before = fleet.groups[0].shard
    ray.kill(before)
    until(fleet, lambda: fleet.groups[0].shard is not before and not fleet.watch.unhealthy())
    assert ray.get(fleet.groups[0].shard.stats.remote(), timeout=60)["policy"]["occupancy"] == 0.5


def test_what_does_not_fit_is_refused_with_what_is_missing(fleet: Fleet) -> None:
    from evolve.service import ServiceError

    fleet.config = replace(fleet.config, cluster=replace(fleet.config.cluster, shards=99))
    with pytest.raises(ServiceError, match=r"99 shard\(s\) need .* node\(s\) have room for 8\..*short"):
        fleet.load(Checkpoint("nowhere", "d"), None)


def test_a_node_that_goes_while_engines_start_is_waited_for_no_longer(
    fleet: Fleet, checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pretended, has room for a second shard, and is gone once the first one is at work."""
    ((key, real),) = alive_nodes().items()
    pretended = {"f" * 56: replace(real, name="pretended")}

    def nodes() -> dict[str, Node]:
        return {key: real} | ({} if fleet.groups else pretended)

    monkeypatch.setattr("evolve.cluster.alive_nodes", nodes)
    monkeypatch.setattr("evolve.fleet.alive_nodes", nodes)
    settings = replace(fleet.config.cluster, shards=None, verifier_cpus=3.0, placement_timeout_s=0.0)
    fleet.config = replace(fleet.config, cluster=settings)
    fleet.load(checkpoint("first"), None, EngineConfig(start_timeout_s=60.0))
    assert [group.name for group in fleet.groups] == ["shard-0"]
