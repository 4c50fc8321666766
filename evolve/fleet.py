"""The shards of a run: groups of actors that are placed, started, given checkpoints, watched, replaced and ended.

A shard's engines and its verifier share one placement group on one node, so that no step crosses the network. A group
whose node goes is dropped; where a node with room arrives another is started. Whoever waits while groups work calls
`poll` about once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from evolve.attach import address_of, live_nodes
from evolve.cluster import alive_nodes, bundle, largest_free, layout, may_grow, shard_count
from evolve.evaluate import Evaluator
from evolve.health import Limits
from evolve.placement import Layout, Need, Node, amount, listed
from evolve.policy.engine import PolicyEngine
from evolve.reward.ppm import PPMEngine
from evolve.schema import EngineConfig, EvolveConfig
from evolve.search.shard import Shard
from evolve.service import ServiceError, ServiceHost
from evolve.verify.service import SandboxVerifier
from evolve.watch import Watch

POLL_S = 0.1
ROOM_S = 5.0
"""Between two looks for nodes that came or went."""
JOIN_S = 0.5
"""The same, while a group's actors start, or there is none at work."""
CLIENT_START_S = 300.0
"""For a shard, an evaluator or a verifier, which load no model, to be there."""
LEAVE_S = 30.0
"""For a shard on a node that is drained to make its finished trees durable."""
CLOSE_S = 30.0
MARGIN_S = 30.0
WHOLE_S = 30.0
"""In a joined cluster, for all groups that nodes are large enough for to be placed, before work begins without some."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published model directory and the digest that identifies it."""

    path: str
    digest: str

    @property
    def named(self) -> tuple[str, str]:
        """(path, digest), as it travels to actors."""
        return self.path, self.digest


@dataclass(frozen=True, slots=True)
class Engines:
    """The classes whose objects serve as engines; made and called as these are."""

    policy: Callable[..., Any] = PolicyEngine
    ppm: Callable[..., Any] = PPMEngine


@dataclass(slots=True)
class Group:
    """The actors of one shard."""

    name: str
    placement: PlacementGroup
    node: str = ""
    """Ray's id of the node it is on; empty until it is placed."""
    policy: Any = None
    verifier: Any = None
    ppm: Any = None
    shard: Any = None
    evaluator: Any = None

    def services(self) -> list[Any]:
        """The engines and the verifier."""
        return [actor for actor in (self.policy, self.ppm, self.verifier) if actor is not None]

    def names(self) -> list[str]:
        """What its actors are called in messages."""
        roles = {
            "policy engine": self.policy, "verifier": self.verifier, "PPM engine": self.ppm,
            "shard actor": self.shard, "evaluator": self.evaluator,
        }  # fmt: skip
        return [f"{role} of {self.name}" for role, actor in roles.items() if actor is not None]


@dataclass(slots=True)
class _Serving:
    """What all groups are to serve."""

    policy: Checkpoint
    ppm: Checkpoint | None
    engine: EngineConfig


@dataclass(slots=True)
class Fleet:
    """All shards of a run: started when first needed, given other weights in place, ended as one."""

    config: EvolveConfig
    device: str
    engines: Engines = Engines()
    on_wait: Callable[[str], object] = lambda _: None
    """Told now and then what shards wait for."""
    groups: list[Group] = field(default_factory=list)
    """Those that are ready to work."""
    events: list[str] = field(default_factory=list)
    """What happened to groups, for the user: lost, left out, joined."""
    watch: Watch = field(init=False)
    _joining: list[Group] = field(default_factory=list)
    _leaving: dict[str, tuple[Group, float]] = field(default_factory=dict)
    _serving: _Serving | None = None
    _numbered: int = 0
    _empty: float | None = None
    """Since when there is no group at work."""
    _looked: float = float("-inf")
    _awaited: int = 1
    """Groups to wait for before work begins; a node that goes meanwhile makes them fewer."""

    def __post_init__(self) -> None:
        cluster = self.config.cluster
        silence = cluster.silence_s
        self.watch = Watch(Limits(cluster.restarts, cluster.restart_window_s, suspect_s=silence / 5, silence_s=silence))

    def load(self, policy: Checkpoint, ppm: Checkpoint | None, engine: EngineConfig | None = None) -> None:
        """Make every shard serve these checkpoints. `engine`: settings of another model than the policy's.

        Raises:
            ServiceError: there is no room, or shards are not ready in time.
            Exhausted: an engine died too often.
        """
        engine = engine or self.config.policy.engine
        before = self._serving
        if before is not None and (
            engine is not before.engine or (ppm is not None and before.ppm is None and self.device == "gpu")
        ):
            self.stop()
            before = None
        ppm = ppm or (before.ppm if before else None)
        self._serving = _Serving(policy, ppm, engine)
        self._awaited = shard_count(self.config, self._need()) if before is None else 1
        for group in [*self.groups, *self._joining]:
            if ppm is not None and group.ppm is None and group.node:
                self._add_ppm(group)
            self._expect(group)
        self._wait(self._complete, engine.start_timeout_s + self.config.cluster.placement_timeout_s)
        wanted = self.config.cluster.shards or 1
        if before is None and len(self.groups) < wanted:
            self.events.append(f"{len(self.groups)} of {wanted} shards are at work; {self._lacking()}")

    def _complete(self, waited_s: float) -> bool:
        """Whether work can begin, `waited_s` seconds after it was asked for.

        In a joined cluster others may have what a group needs: it joins when they are done.
        """
        starting = any(group.node for group in self._joining)
        others = address_of(self.config.cluster) is not None and waited_s > WHOLE_S and not starting
        enough = len(self.groups) >= self._awaited or (others and bool(self.groups))
        return enough and not self._unready()

    def poll(self) -> None:
        """Look after all actors, and at which nodes came and went.

        Raises:
            Exhausted: an actor died too often.
            ServiceError: no shard is left, and none has come for `cluster.placement_timeout_s`.
        """
        if self._serving is None:
            return
        now = time.monotonic()
        starting = not self.groups or any(group.node for group in self._joining)
        if now - self._looked > (JOIN_S if starting else ROOM_S):
            self._looked = now
            nodes = alive_nodes()
            self._drop_lost(nodes, now)
            self._recruit(nodes)
            self._join(nodes)
        self._let_go(now)
        unattended = self.watch.poll()
        self._empty = None if self.groups else now if self._empty is None else self._empty + unattended
        patience = self.config.cluster.placement_timeout_s + self._serving.engine.start_timeout_s
        if self._empty is not None and now - self._empty > patience:
            raise ServiceError(f"no shard has been at work for {patience:.0f} s: {self._lacking()}")

    def release(self) -> None:
        """Give the accelerators to the trainers, unless engines are to be kept up."""
        keep = self.config.cluster.keep_engines
        if not (self.device == "cpu" if keep is None else keep):
            self.stop()
        for group in [group for group in self._joining if not group.node]:  # else a node that comes would be theirs
            self._joining.remove(group)
            remove_placement_group(group.placement)

    def stop(self) -> None:
        """End all actors and give back what they reserved."""
        groups = [*self.groups, *self._joining, *(group for group, _ in self._leaving.values())]
        self.groups, self._joining, self._leaving = [], [], {}
        self._serving = self._empty = None
        self._looked = float("-inf")
        for group in groups:
            self.watch.drop(*group.names())
            for client in (group.shard, group.evaluator):  # before the engines they wait for
                if client is not None:
                    ray.kill(client)
        closing = [actor.close.remote() for group in groups for actor in group.services()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for group in groups:
            self._end(group)

    # ------------------------------------------------------------------ groups that come and go

    def _need(self) -> dict[str, float]:
        assert self._serving is not None
        return bundle(self.config, self._serving.engine, self.device, self._serving.ppm is not None)

    def _recruit(self, nodes: dict[str, Node]) -> None:
        """Ask for as many groups as there is room for, and where nodes may come for more."""
        need = self._need()
        found = layout(self.config, need, nodes.values())
        self._awaited = max(1, min(self._awaited, found.placed))
        for _ in range(self._asked(found) - len(self.groups) - len(self._joining)):
            name = f"shard-{self._numbered}"
            self._numbered += 1
            self._joining.append(Group(name, placement_group([need], strategy="STRICT_PACK", name=name)))

    def _asked(self, found: Layout) -> int:
        """How many groups there should be. A placement group that waits is what an autoscaler adds nodes for.

        Where no number is set, as many again as fit, so that a cluster with GPUs doubles until it has all nodes it may.
        """
        cluster = self.config.cluster
        if not may_grow(cluster):
            return found.placed
        if cluster.shards is None and self.device == "gpu":
            return max(1, 2 * found.placed)
        return max(found.placed, found.wanted)

    def _join(self, nodes: dict[str, Node]) -> None:
        """Start the actors of groups that were placed; those whose actors are ready begin to work."""
        for group in list(self._joining):
            if not group.node:
                table: Any = placement_group_table(group.placement)
                if table.get("state") == "CREATED":
                    group.node = table["bundles_to_node_id"][0]
                    self._start(group)
            elif not self.watch.unhealthy(*group.names()):
                self._joining.remove(group)
                self.groups.append(group)
                self.groups.sort(key=lambda g: int(g.name.rpartition("-")[2]))
                if len(nodes) > 1:
                    self.events.append(f"{group.name} is at work on node {group.node[:8]}")

    def _drop_lost(self, nodes: dict[str, Node], now: float) -> None:
        """Leave out groups whose node is gone or going; the latter may first make durable what they have."""
        lost = [g for g in (*self.groups, *self._joining) if g.node and g.node not in nodes]
        going = {node.id for node in live_nodes()} if lost else set()
        for group in lost:
            (self.groups if group in self.groups else self._joining).remove(group)
            self.watch.drop(*group.names())
            if group.node in going and group.shard is not None:
                self.events.append(f"node {group.node[:8]} is being drained: {group.name} stops")
                group.shard.stop.remote()
                self._leaving[group.name] = (group, now + LEAVE_S)
            else:
                self.events.append(f"node {group.node[:8]} is gone, and {group.name} with it")
                self._end(group)

    def _let_go(self, now: float) -> None:
        for group, until in list(self._leaving.values()):
            if now > until:
                del self._leaving[group.name]
                self._end(group)

    @staticmethod
    def _end(group: Group) -> None:
        for actor in (group.shard, group.evaluator, *group.services()):
            if actor is not None:
                ray.kill(actor)
        remove_placement_group(group.placement)

    def _wait(self, ready: Callable[[float], bool], timeout_s: float) -> None:
        began = told = time.monotonic()
        while True:
            self.poll()
            if ready(time.monotonic() - began):
                return
            if time.monotonic() - told > ROOM_S:
                told = time.monotonic()
                self.on_wait(self._lacking())
            if time.monotonic() - began > timeout_s:
                raise ServiceError(f"shards are not ready after {timeout_s:.0f} s: {self._lacking()}")
            time.sleep(POLL_S)

    def _unready(self) -> dict[str, str]:
        return self.watch.unhealthy(*(name for group in self.groups for name in group.names()))

    def _lacking(self) -> str:
        need = self._need()
        lacking = [f"{name} is {state}" for name, state in self.watch.unhealthy().items()]
        waiting = [group.name for group in self._joining if not group.node]
        if waiting:
            most = ", ".join(f"{free:g} {kind}" for kind, free in largest_free(need).items())
            each = amount(Need(need["CPU"], need.get("GPU", 0.0)))
            lacking.append(f"{listed(waiting, 4)}: {each} needed on one node, where at most {most} are free")
        return "; ".join(lacking) or f"{len(self.groups)} group(s) are"

    # ------------------------------------------------------------------ actors

    def _start(self, group: Group) -> None:
        """Make and watch the actors of a group that was placed."""
        assert self._serving is not None
        policy, engine = self._serving.policy, self._serving.engine
        make = partial(self.engines.policy, policy.path, engine, policy.digest, self.device)
        group.policy = self._service(group, make, engine.gpus)
        group.verifier = self._service(group, partial(SandboxVerifier, self.config.verifier), 0)
        self.watch.add(f"policy engine of {group.name}", group.policy, engine.start_timeout_s, policy.named)
        self.watch.add(f"verifier of {group.name}", group.verifier, CLIENT_START_S)
        if self._serving.ppm is not None:
            self._add_ppm(group)
        else:
            self._add_clients(group)

    def _add_ppm(self, group: Group) -> None:
        """Start a PPM engine beside the others; the group's clients are made anew to know it."""
        assert self._serving is not None
        assert self._serving.ppm is not None
        ppm, settings = self._serving.ppm, self.config.ppm
        make = partial(
            self.engines.ppm, ppm.path, settings.form, settings.score_scale, settings.engine, ppm.digest, self.device
        )
        group.ppm = self._service(group, make, settings.engine.gpus)
        self.watch.add(f"PPM engine of {group.name}", group.ppm, settings.engine.start_timeout_s, ppm.named)
        for client in (group.shard, group.evaluator):
            if client is not None:
                ray.kill(client)
        self._add_clients(group)

    def _add_clients(self, group: Group) -> None:
        """The shard actor and the evaluator: callers of the services, replaced when they die."""

        def client(kind: type, attribute: str) -> Callable[[], Any]:
            def make() -> Any:
                timeout = self._request_timeout_s()
                options = {**self._placed(group), "num_cpus": 0, "max_concurrency": 100}
                actor: Any = ray.remote(kind).options(**options)
                setattr(group, attribute, actor.remote(group.name, group.policy, group.verifier, group.ppm, timeout))
                return getattr(group, attribute)

            return make

        for role, make in (("shard actor", client(Shard, "shard")), ("evaluator", client(Evaluator, "evaluator"))):
            self.watch.add(f"{role} of {group.name}", make(), CLIENT_START_S, replace=make, hosted=False)

    def _request_timeout_s(self) -> float:
        """For one answer of a service, as its clients see it: engines, which have limits of their own, judge before."""
        assert self._serving is not None
        engines = [self._serving.engine, *([self.config.ppm.engine] if self._serving.ppm is not None else [])]
        return max(engine.request_timeout_s for engine in engines) + MARGIN_S

    def _service(self, group: Group, factory: Callable[[], Any], gpus: float) -> Any:
        """A service's actor. Ray restarts it without end; the watch says when it is enough."""
        options: dict[str, Any] = {
            **self._placed(group),
            "num_cpus": 0,
            "num_gpus": gpus if self.device == "gpu" else 0,
            "max_concurrency": 1000,
            "max_restarts": -1,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}} if self.device == "cpu" else {},
        }
        return ray.remote(ServiceHost).options(**options).remote(factory)

    @staticmethod
    def _placed(group: Group) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(group.placement, placement_group_bundle_index=0)
        return {"scheduling_strategy": strategy}

    def _expect(self, group: Group) -> None:
        """Tell the engines of a group what to serve; weights are swapped in place."""
        assert self._serving is not None
        if group.policy is not None:
            self.watch.expect(f"policy engine of {group.name}", self._serving.policy.named)
        if group.ppm is not None and self._serving.ppm is not None:
            self.watch.expect(f"PPM engine of {group.name}", self._serving.ppm.named)
