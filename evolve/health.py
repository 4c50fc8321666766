"""The health of one actor as a state machine: what is known of it, and what is to be done about it. Nothing of Ray.

            answered, right digest
    STARTING ----> CHECKING ----> HEALTHY <----> SUSPECT      silent for `suspect_s`, and back by an answer
        ^              ^                |             |
        |              +-- expects -----+             |       another checkpoint is to be served
        +------------- RESTARTING <-------------------+       died, silent for `silence_s`, or not up in `start_s`
                           |
                         FAILED                               died more than `restarts` times within `window_s`

An actor that serves a checkpoint is healthy only while the last digest it answered with is the one expected: a
restarted engine, and one that loads another checkpoint, are not until they have said so. All times are seconds of one
monotonic clock, given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """What is known of an actor."""

    STARTING = "starting"
    """Its process has not answered yet."""
    CHECKING = "checking digest"
    """It answers, but what it serves is not known to be what is expected."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It has not answered for a while; it may be busy."""
    RESTARTING = "restarting"
    """It has died, or was given up; its successor has not answered yet."""
    FAILED = "failed"
    """It died more often than it may; the run stops."""


class Act(StrEnum):
    """What is to be done about an actor now."""

    WAIT = "wait"
    KILL = "kill"
    """End its process, so that it is started again."""
    STOP = "stop"
    """Stop the run and report."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an actor may take, seconds, and how often it may die."""

    restarts: int = 3
    """Deaths within `window_s` that are mended; one more, and the run stops."""
    window_s: float = 3600.0
    start_s: float = 900.0
    """From its start to its first answer with the right digest."""
    suspect_s: float = 30.0
    silence_s: float = 300.0
    """Without an answer while healthy; then it is killed."""


@dataclass(frozen=True, slots=True)
class Death:
    """One death of an actor."""

    at: float
    reason: str


@dataclass(slots=True)
class Health:
    """The state of one actor. Every event has the time it was seen at."""

    name: str
    limits: Limits
    expected: str = ""
    """Digest of the checkpoint it must serve; empty: it serves none."""
    state: State = State.STARTING
    since: float = 0.0
    """When the state began; for `SUSPECT`, when it last answered. Later by what was `unattended` since."""
    deaths: list[Death] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    """From each death to health again."""

    def answered(self, now: float, digest: str | None) -> None:
        """It answered, and serves the checkpoint with this digest ("": none; None: it is not ready to serve)."""
        if self.state is State.FAILED:
            return
        if digest == self.expected:
            if self.state is not State.HEALTHY and len(self.recovery_s) < len(self.deaths):
                self.recovery_s.append(now - self.deaths[-1].at)
            self._enter(State.HEALTHY, now)
        elif self.state is not State.CHECKING:
            self._enter(State.CHECKING, now)

    def expects(self, now: float, digest: str) -> None:
        """From now on it must serve this checkpoint."""
        if digest == self.expected:
            return
        self.expected = digest
        if self.state in (State.HEALTHY, State.SUSPECT):
            self._enter(State.CHECKING, now)

    def died(self, now: float, reason: str) -> Act:
        """Its process is gone. Told again of the same death it changes nothing."""
        if self.state in (State.RESTARTING, State.FAILED):
            return Act.STOP if self.state is State.FAILED else Act.WAIT
        self.deaths.append(Death(now, reason))
        recent = [death for death in self.deaths if now - death.at <= self.limits.window_s]
        failed = len(recent) > self.limits.restarts
        self._enter(State.FAILED if failed else State.RESTARTING, now)
        return Act.STOP if failed else Act.WAIT

    def failed(self, now: float, reason: str) -> Act:
        """Its process may be there, but what it is to run is not, or is silent: it counts as dead and must go."""
        if self.state is State.RESTARTING:  # the successor: a death of its own
            self._enter(State.STARTING, now)
        return Act.KILL if self.died(now, reason) is Act.WAIT else Act.STOP

    def replaced(self, now: float) -> None:
        """Another actor was made in its place; what becomes of that is new."""
        if self.state is State.RESTARTING:
            self._enter(State.STARTING, now)

    def tick(self, now: float) -> Act:
        """Time has passed; nothing else was heard."""
        passed = now - self.since
        if self.state is State.FAILED:
            return Act.STOP
        if self.state is State.HEALTHY and passed > self.limits.suspect_s:
            self.state = State.SUSPECT  # `since` stays: it counts from the last answer
        if self.state is State.SUSPECT and passed > self.limits.silence_s:
            return self.failed(now, f"it did not answer for {self.limits.silence_s:.0f} s")
        if self.state in (State.STARTING, State.CHECKING, State.RESTARTING) and passed > self.limits.start_s:
            doing = {
                State.STARTING: "start",
                State.CHECKING: "serve the checkpoint it was to load",
                State.RESTARTING: "come back after its death",
            }[self.state]
            return self.failed(now, f"it did not {doing} within {self.limits.start_s:.0f} s")
        return Act.WAIT

    def unattended(self, now: float, seconds: float) -> None:
        """For so long nobody asked or looked: this counts neither as silence nor as a start that takes long."""
        self.since = min(self.since + seconds, now)

    # ------------------------------------------------------------------ inside

    def _enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now
