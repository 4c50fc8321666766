"""Looking after actors: their pulse is felt without waiting, the dead are started again, and too many deaths stop the
run with a report.

`evolve.health` decides; here its decisions meet Ray. Nothing in this module waits for an actor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evolve.errors import EvolveError
from evolve.health import Act, Health, Limits, State
from evolve.service import Pulse, Question, for_good

PULSE_S = 2.0
ATTENDED_S = 2.0
"""What passes from one poll to the next counts for at most so long: who does not look does not know who was silent."""
LAST_LINES = 12
LOG_TIMEOUT_S = 10.0


class Exhausted(EvolveError):
    """An actor died more often than it may: the report of it."""


@dataclass(slots=True)
class Watched:
    """An actor, its health, and how to replace it."""

    actor: Any
    health: Health
    expects: tuple[str, str] | None = None
    """(path, digest) of the checkpoint it must serve."""
    replace: Callable[[], Any] | None = None
    """Makes another actor in its place; None where Ray restarts it under the same handle."""
    hosted: bool = True
    """Whether it is a `ServiceHost`; any other actor is healthy once it answers."""
    pulse: Pulse | None = None
    _question: Question = field(init=False)
    _starting: Any = None

    def __post_init__(self) -> None:
        self._question = Question(self._ask, PULSE_S)

    def poll(self, now: float) -> Act:
        """Hear of the actor what there is to hear, and begin what is to be done.

        Raises:
            EvolveError: its service cannot run for a reason that no restart mends.
        """
        act = self._feel(now)
        if act is Act.WAIT and self.hosted and self.health.state is State.CHECKING:
            act = self._start(now)
        if act is Act.KILL:
            ray.kill(self.actor, no_restart=self.replace is not None)
        if self.health.state is State.RESTARTING:
            self._starting = None
            if self.replace is not None:
                self.actor = self.replace()
                self._question = Question(self._ask, PULSE_S)  # what the dead one was asked is not the new one's death
                self.health.replaced(now)
        return act

    def expect(self, now: float, expects: tuple[str, str]) -> None:
        """From now on it must serve this checkpoint."""
        self.expects = expects
        self.health.expects(now, expects[1])

    def _ask(self) -> Any:
        return (self.actor.pulse if self.hosted else self.actor.__ray_ready__).remote()

    def _feel(self, now: float) -> Act:
        try:
            pulse = self._question.poll(now)
        except RayTaskError as error:  # its health check, which fails when its service is no more
            return self.health.failed(now, _first_line(error.cause))
        except RayActorError as error:
            return self.health.died(now, _first_line(error))
        if pulse is None:
            return self.health.tick(now)
        if not self.hosted:
            self.health.answered(now, self.health.expected)
            return Act.WAIT
        act = Act.WAIT
        if self.pulse is not None and self.pulse.pid != pulse.pid:
            # It died and was back before it was asked again.
            act = self.health.died(now, f"process {self.pulse.pid} ended")
            self._starting = None
        self.pulse = pulse
        self.health.answered(now, pulse.serving)
        return act

    def _start(self, now: float) -> Act:
        """Have the service started with what it must serve; asked for once, seen to until it is done."""
        if self._starting is None:
            self._starting = self.actor.start.remote(self.expects)
            return Act.WAIT
        if not ray.wait([self._starting], timeout=0)[0]:
            return Act.WAIT
        started, self._starting = self._starting, None
        try:
            ray.get(started)
        except RayTaskError as error:
            if for_good(error):
                raise EvolveError(f"{self.health.name} cannot start: {error.cause}") from error
            return self.health.failed(now, _first_line(error.cause))
        except RayActorError:
            return Act.WAIT  # its pulse tells
        return Act.WAIT


class Watch:
    """All actors of a run that are looked after."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._watched: dict[str, Watched] = {}
        self._polled = float("inf")
        self.recoveries: deque[tuple[str, str, float]] = deque(maxlen=1000)
        """(actor, what it had died of, seconds until it was healthy again), newest last."""

    def add(
        self,
        name: str,
        actor: Any,
        start_s: float,
        expects: tuple[str, str] | None = None,
        *,
        replace: Callable[[], Any] | None = None,
        hosted: bool = True,
    ) -> None:
        """Begin to look after an actor, `start_s` seconds being what its start may take."""
        limits = replace_fields(self._limits, start_s=start_s)
        health = Health(name, limits, expects[1] if expects else "", since=time.monotonic())
        self._watched[name] = Watched(actor, health, expects, replace, hosted)

    def expect(self, name: str, expects: tuple[str, str]) -> None:
        """From now on this actor must serve the checkpoint with that (path, digest)."""
        self._watched[name].expect(time.monotonic(), expects)

    def allow(self, name: str, start_s: float) -> None:
        """From now on the start of this actor may take so long."""
        health = self._watched[name].health
        health.limits = replace_fields(health.limits, start_s=start_s)

    def drop(self, *names: str) -> None:
        """Look after these no longer."""
        for name in names:
            self._watched.pop(name, None)

    def poll(self) -> float:
        """Look after all of them; return the seconds since the last time for which nobody did.

        Raises:
            Exhausted: one died too often.
            EvolveError: one cannot run for a reason that no restart mends.
        """
        now = time.monotonic()
        unattended = max(0.0, now - self._polled - ATTENDED_S)
        self._polled = now
        for watched in list(self._watched.values()):
            health = watched.health
            health.unattended(now, unattended)
            mended = len(health.recovery_s)
            if watched.poll(time.monotonic()) is Act.STOP:
                raise Exhausted(_report(watched))
            if len(health.recovery_s) > mended:
                self.recoveries.append((health.name, health.deaths[-1].reason, health.recovery_s[-1]))
        return unattended

    def unhealthy(self, *names: str) -> dict[str, str]:
        """The state of each of these actors (none given: all) that is not healthy."""
        found = [self._watched[name] for name in names] if names else list(self._watched.values())
        fine = (State.HEALTHY, State.SUSPECT)
        return {w.health.name: w.health.state.value for w in found if w.health.state not in fine}

    def pids(self) -> dict[str, int]:
        """Process id of every hosted actor that has answered, by its name."""
        return {name: w.pulse.pid for name, w in self._watched.items() if w.pulse is not None}


def _report(watched: Watched) -> str:
    """What died, how often, of what, and what it wrote last."""
    health, now = watched.health, time.monotonic()
    limits = health.limits
    lines = [
        f"{health.name} died {len(health.deaths)} times; {limits.restarts} times within {limits.window_s:.0f} s are "
        f"mended (cluster.restarts, cluster.restart_window_s):"
    ]
    lines += [f"  {now - death.at:.0f} s ago: {death.reason}" for death in health.deaths]
    if watched.pulse is not None and watched.pulse.log:
        lines.append(f"last lines of {watched.pulse.log} on node {watched.pulse.node[:8]}:")
        lines += [f"  | {line}" for line in last_lines(watched.pulse)]
    return "\n".join(lines)


def last_lines(pulse: Pulse) -> list[str]:
    """The end of an actor's log; read on its node, where that is still there."""
    here = Path(pulse.log)
    if here.is_file() and pulse.node == ray.get_runtime_context().get_node_id():
        return _tail(pulse.log)
    strategy = NodeAffinitySchedulingStrategy(pulse.node, soft=False)
    reading = ray.remote(_tail).options(num_cpus=0, scheduling_strategy=strategy).remote(pulse.log)
    try:
        return ray.get(reading, timeout=LOG_TIMEOUT_S)
    except (ray.exceptions.RayError, OSError) as error:
        return [f"(cannot be read: {_first_line(error)})"]


def _tail(path: str) -> list[str]:
    with Path(path).open(errors="replace") as file:
        return [line.rstrip() for line in deque(file, LAST_LINES)]


def _first_line(error: BaseException) -> str:
    """An error in a line; of Ray's, what it says of the process' end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "killed" in line.lower() or "node" in line.lower()]
    return (telling or lines or [type(error).__name__])[0].partition(" Some common causes")[0][:300]
