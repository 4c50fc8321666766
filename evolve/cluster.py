"""Everything that is Ray plumbing: connecting, placing, starting and stopping the actors of a run.

A shard's engines and its verifier share one placement group on one node, so that no step crosses the network.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from evolve.evaluate import Evaluator
from evolve.policy.engine import PolicyEngine
from evolve.reward.ppm import PPMEngine
from evolve.schema import ClusterConfig, Device, EngineConfig, EvolveConfig, PPMConfig
from evolve.search.shard import Shard
from evolve.service import ServiceError, ServiceHost, get
from evolve.verify.service import SandboxVerifier

LOCAL_CPUS = 4
"""Logical CPUs of a local cluster at least: enough slots for every role, whatever the machine has."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published model directory and the digest that identifies it."""

    path: str
    digest: str


def connect(config: ClusterConfig) -> str:
    """Join the cluster this process belongs to, or start a local one; returns the device, `cpu` or `gpu`.

    Raises:
        ServiceError: GPUs are asked for and the cluster has none.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            cpus = max(LOCAL_CPUS, os.cpu_count() or 1)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.device is Device.gpu and not gpus:
        raise ServiceError(
            "cluster.device=gpu, but the Ray cluster has no GPU. Start it with GPU nodes (cluster.yaml), or use "
            "cluster.device=auto or a CPU recipe (conf=quickstart)."
        )
    return "gpu" if gpus and config.device is not Device.cpu else "cpu"


def bundle(config: EvolveConfig, engine: EngineConfig, device: str, ppm: bool) -> dict[str, float]:
    """What one shard takes of its node: CPUs for its verifier, GPUs for its engines.

    On CPUs engines reserve none: they stay up beside the trainers, and reservations only order who may start.
    """
    if device == "cpu":
        return {"CPU": config.cluster.verifier_cpus}
    gpus = engine.gpus + (config.ppm.engine.gpus if ppm else 0.0)
    return {"CPU": config.cluster.verifier_cpus, "GPU": gpus}


def shard_count(config: EvolveConfig, need: dict[str, float]) -> int:
    """`cluster.shards`, or as many as the nodes have room for.

    Raises:
        ServiceError: not even one fits; the message says what is missing and what the largest node has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(int(min(node.get(kind, 0.0) / amount for kind, amount in need.items() if amount)) for node in nodes)
    wanted = config.cluster.shards or fits
    if "GPU" not in need:
        wanted = config.cluster.shards or len(nodes)
    if wanted < 1 or fits < wanted:
        largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in need}
        raise ServiceError(
            f"{max(wanted, 1)} shard(s) need {need} each on one node; {len(nodes)} node(s) have room for {fits}, the "
            f"most that one node has is {largest}. Add nodes, or lower cluster.shards, cluster.verifier_cpus or "
            f"the engines' gpus."
        )
    return wanted


def reserve(need: dict[str, float], name: str, timeout_s: float) -> PlacementGroup:
    """A placement group of one bundle, once it is granted.

    Raises:
        ServiceError: not granted in time; the message says what is free.
    """
    group = placement_group([need], strategy="STRICT_PACK", name=name)
    if not group.wait(timeout_s):
        remove_placement_group(group)
        raise ServiceError(
            f"placement group of {name} needs {need} on one node and was not granted within {timeout_s:.0f} s; "
            f"free in the whole cluster: {ray.available_resources()}"
        )
    return group


@dataclass(slots=True)
class Group:
    """The actors of one shard."""

    name: str
    placement: PlacementGroup
    policy: Any
    verifier: Any
    ppm: Any | None
    shard: Any
    evaluator: Any

    def services(self) -> list[Any]:
        """The engines and the verifier."""
        return [actor for actor in (self.policy, self.ppm, self.verifier) if actor is not None]


@dataclass(slots=True)
class Fleet:
    """All shards of a run: started when first needed, given other weights in place, ended as one."""

    config: EvolveConfig
    device: str
    groups: list[Group] = field(default_factory=list)
    _policy: Checkpoint | None = None
    _ppm: Checkpoint | None = None
    _engine: EngineConfig | None = None

    def load(self, policy: Checkpoint, ppm: Checkpoint | None, engine: EngineConfig | None = None) -> None:
        """Make every shard serve these checkpoints. `engine`: settings of another model than the policy's."""
        engine = engine or self.config.policy.engine
        add_ppm = ppm is not None and self._ppm is None
        if self.groups and (engine is not self._engine or (add_ppm and self.device == "gpu")):
            self.stop()
        if self.groups and ppm is not None and add_ppm:
            self._add_ppm(ppm)
        if not self.groups:
            self._start(policy, ppm, engine)
        if self._policy != policy:
            self._reload("policy", policy)
        if ppm is not None and self._ppm != ppm:
            self._reload("ppm", ppm)
        self._policy, self._engine = policy, engine
        self._ppm = ppm or self._ppm

    def release(self) -> None:
        """Give the accelerators to the trainers, unless engines are to be kept up."""
        keep = self.config.cluster.keep_engines
        if not (self.device == "cpu" if keep is None else keep):
            self.stop()

    def stop(self) -> None:
        """End all actors and give back what they reserved."""
        for group in self.groups:
            for client in (group.shard, group.evaluator):  # before the engines they wait for
                ray.kill(client)
            closing = [actor.close.remote() for actor in group.services()]
            ray.wait(closing, num_returns=len(closing), timeout=30)
            for actor in group.services():
                ray.kill(actor)
            remove_placement_group(group.placement)
        self.groups.clear()
        self._policy = self._ppm = self._engine = None

    # ------------------------------------------------------------------ inside

    def _start(self, policy: Checkpoint, ppm: Checkpoint | None, engine: EngineConfig) -> None:
        need = bundle(self.config, engine, self.device, ppm is not None)
        count = shard_count(self.config, need)
        timeout = self.config.cluster.placement_timeout_s
        for number in range(count):
            name = f"shard-{number}"
            placement = reserve(need, name, timeout)
            self.groups.append(self._group(name, placement, policy, ppm, engine))
        services = [(actor, group.name) for group in self.groups for actor in group.services()]
        _ready(services, engine.start_timeout_s)
        self._policy, self._ppm, self._engine = policy, ppm, engine

    def _group(
        self, name: str, placement: PlacementGroup, policy: Checkpoint, ppm: Checkpoint | None, engine: EngineConfig
    ) -> Group:
        make_policy = partial(PolicyEngine, policy.path, engine, policy.digest, self.device)
        policy_actor = self._service(placement, make_policy, engine.gpus)
        verifier = self._service(placement, partial(SandboxVerifier, self.config.verifier), 0, restarts=3)
        ppm_actor = self._ppm_service(placement, ppm) if ppm else None
        shard, evaluator = self._clients(name, placement, policy_actor, verifier, ppm_actor)
        return Group(name, placement, policy_actor, verifier, ppm_actor, shard, evaluator)

    def _clients(self, name: str, placement: PlacementGroup, policy: Any, verifier: Any, ppm: Any) -> tuple[Any, Any]:
        timeout = self.config.policy.engine.request_timeout_s
        options = {**self._placed(placement), "num_cpus": 0, "max_concurrency": 100}
        shard = ray.remote(Shard).options(**options).remote(name, policy, verifier, ppm, timeout)
        evaluator = ray.remote(Evaluator).options(**options).remote(name, policy, verifier, ppm, timeout)
        return shard, evaluator

    def _ppm_service(self, placement: PlacementGroup, ppm: Checkpoint) -> Any:
        settings: PPMConfig = self.config.ppm
        make = partial(
            PPMEngine, ppm.path, settings.form, settings.score_scale, settings.engine, ppm.digest, self.device
        )
        return self._service(placement, make, settings.engine.gpus)

    def _service(self, placement: PlacementGroup, factory: Callable[[], Any], gpus: float, restarts: int = 3) -> Any:
        options: dict[str, Any] = {
            **self._placed(placement),
            "num_cpus": 0,
            "num_gpus": gpus if self.device == "gpu" else 0,
            "max_concurrency": 1000,
            "max_restarts": restarts,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}} if self.device == "cpu" else {},
        }
        return ray.remote(ServiceHost).options(**options).remote(factory)

    @staticmethod
    def _placed(placement: PlacementGroup) -> dict[str, Any]:
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=0)}

    def _add_ppm(self, ppm: Checkpoint) -> None:
        """Start the PPM engines beside running policy engines; their clients are made anew to know them."""
        for group in self.groups:
            group.ppm = self._ppm_service(group.placement, ppm)
        _ready([(g.ppm, g.name) for g in self.groups], self.config.ppm.engine.start_timeout_s)
        for group in self.groups:
            for actor in (group.shard, group.evaluator):
                ray.kill(actor)
            group.shard, group.evaluator = self._clients(
                group.name, group.placement, group.policy, group.verifier, group.ppm
            )
        self._ppm = ppm

    def _reload(self, role: str, checkpoint: Checkpoint) -> None:
        """Swap weights in place; every engine answers with the digest it now serves."""
        actors = [getattr(group, role) for group in self.groups]
        refs = [actor.call.remote("reload", checkpoint.path, checkpoint.digest) for actor in actors]
        served = get(refs, self.config.policy.engine.start_timeout_s, f"the {role} engines to load {checkpoint.path}")
        wrong = [digest for digest in served if digest != checkpoint.digest]
        if wrong:
            raise ServiceError(
                f"{role} engines serve {wrong[0][:12]}, not {checkpoint.digest[:12]} of {checkpoint.path}"
            )


def _ready(services: Sequence[tuple[Any, str]], timeout_s: float) -> None:
    """Wait until every service is up; an engine that fails says so at once."""
    waiting = {actor.start.remote(): name for actor, name in services}
    deadline = time.monotonic() + timeout_s
    while waiting:
        left = deadline - time.monotonic()
        done, _ = ray.wait(list(waiting), timeout=max(left, 0))
        if not done:
            raise ServiceError(
                f"not ready after {timeout_s:.0f} s: services of {', '.join(sorted(set(waiting.values())))}"
            )
        for ref in done:
            ray.get(ref)
            del waiting[ref]
