"""The watch over actors, with pretended actors on a pretended clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from evolve import watch as module
from evolve.health import Limits
from evolve.service import Pulse
from evolve.watch import Watch

LIMITS = Limits(restarts=3, window_s=3600.0, suspect_s=60.0, silence_s=300.0)
CHECKPOINT = ("/checkpoint", "digest")


@dataclass
class World:
    """Actors that answer a second after they were asked, and what was done to them."""

    now: float = 1000.0
    silent: bool = False
    killed: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.killed.append(self.now)

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """What was asked of the actor by a call of its own is never done."""
        return [], references

    def question(self, ask: Callable[[], Any], every_s: float) -> Any:
        asked: list[float] = []

        def poll(now: float) -> Pulse | None:
            if not asked:
                asked.append(now)
            if self.killed and asked[0] <= self.killed[-1]:
                asked.clear()
                raise RayActorError
            if self.silent or now < asked[0] + 1.0:
                return None
            asked.clear()
            return Pulse("digest", 1, "", "node")

        return SimpleNamespace(poll=poll)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(module, "Question", made.question)
    return made


@pytest.fixture
def watch(world: World) -> Watch:
    made = Watch(LIMITS)
    actor = SimpleNamespace(start=SimpleNamespace(remote=lambda expects: object()))
    made.add("engine", actor, 900.0, CHECKPOINT)
    poll_for(made, world, 10)
    assert made.unhealthy() == {}
    return made


def poll_for(watch: Watch, world: World, seconds: int) -> None:
    """Once a second, as whoever waits does."""
    for _ in range(seconds):
        world.now += 1.0
        watch.poll()


@pytest.mark.parametrize("hours", [0.2, 1.0, 72.0])
def test_a_sound_actor_outlives_a_time_in_which_nobody_polls(watch: Watch, world: World, hours: float) -> None:
    for _ in range(3):
        world.now += hours * 3600.0
        assert watch.poll() == pytest.approx(hours * 3600.0, abs=10.0)
        poll_for(watch, world, 20)
    assert world.killed == []
    assert watch.unhealthy() == {}


def test_an_actor_that_is_silent_after_such_a_time_is_killed_once_it_has_been_for_long(
    watch: Watch, world: World
) -> None:
    world.silent = True
    world.now += 3600.0
    polled = world.now
    watch.poll()
    poll_for(watch, world, 290)
    assert world.killed == []
    poll_for(watch, world, 20)
    assert len(world.killed) == 1
    assert world.killed[0] == pytest.approx(polled + LIMITS.silence_s, abs=5.0)


def test_a_checkpoint_that_is_being_loaded_while_nobody_polls_is_not_late(watch: Watch, world: World) -> None:
    watch.expect("engine", ("/other", "another digest"))
    poll_for(watch, world, 5)
    world.now += 3600.0
    watch.poll()
    poll_for(watch, world, 800)
    assert world.killed == []
    poll_for(watch, world, 200)
    assert len(world.killed) == 1


def test_an_actor_that_hangs_and_is_replaced_has_died_once(world: World) -> None:
    watch, replaced = Watch(LIMITS), []
    watch.add("shard", object(), 300.0, replace=lambda: replaced.append(world.now), hosted=False)
    poll_for(watch, world, 10)
    world.silent = True
    poll_for(watch, world, 310)
    assert len(replaced) == 1
    world.silent = False
    poll_for(watch, world, 20)
    assert len(replaced) == len(world.killed) == 1
    assert [name for name, _, _ in watch.recoveries] == ["shard"]
    assert watch.unhealthy() == {}


def test_an_actor_whose_start_is_allowed_longer_is_not_killed_for_it(watch: Watch, world: World) -> None:
    watch.allow("engine", 1900.0)
    watch.expect("engine", ("/other", "another digest"))
    poll_for(watch, world, 1800)
    assert world.killed == []
    poll_for(watch, world, 200)
    assert len(world.killed) == 1
