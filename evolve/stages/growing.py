"""The search of one round under way: every shard grows, whatever takes a shard's place grows on, and a board that dies
is made again.

Shards are told apart by their calls of `grow`. However such a call ends, the board is told which of the shard's trees
are durable, and gets the others back; so a tree is counted once, and grown again only when it was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from evolve.fleet import CLIENT_START_S
from evolve.placement import listed
from evolve.search.board import Progress
from evolve.search.shard import SearchJob
from evolve.service import Question, ServiceError, get
from evolve.store.parts import Parts, mend_parts, mended_parts
from evolve.store.run import RunError
from evolve.store.trees import Part
from evolve.watch import Watch

PROGRESS_S = 0.5
STATS_S = 2.0
SETTLE_S = 20.0
"""For shards that were told to stop to make their finished trees durable."""
BOARD = "board"


class Shards(Protocol):
    """What grows trees: a fleet, or what stands where one does."""

    watch: Watch

    @property
    def groups(self) -> Sequence[Any]:
        """Those at work, each with a `name` and its `shard`."""
        ...

    def poll(self) -> None:
        """Look after their actors."""
        ...


class Growing:
    """Grows the trees of one round on a fleet; whoever waits for it calls `poll` about once a second."""

    def __init__(
        self, fleet: Shards, job: SearchJob, make_board: Callable[[Parts], tuple[Any, float]], problems: Container[str]
    ) -> None:
        """
        Args:
            make_board: makes the actor from the part files that are there; returns it with the seconds that its start
                may take.
            problems: ids of those whose trees are grown.

        Raises:
            RunError: there are trees of other problems.
        """
        self._fleet, self._job, self._make_board = fleet, job, make_board
        self.notes: list[str] = []
        """What had to be mended, for the user."""
        self._growing: dict[Any, tuple[str, Any]] = {}
        """Name and handle of the shard by its call of `grow`."""
        self._stats: dict[str, tuple[Question, dict[str, dict[str, float]]]] = {}
        self._problems = problems
        self._start_s = CLIENT_START_S
        self._board = self._new_board()
        self._progress = Question(lambda: self._board.progress.remote(), PROGRESS_S)
        self.latest: Progress | None = None
        fleet.watch.add(BOARD, self._board, self._start_s, replace=self._another_board, hosted=False)

    def poll(self) -> bool:
        """Look after shards and board; whether all trees are durable.

        Raises:
            Exhausted: an actor died too often.
            ServiceError: a tree cannot be grown.
            StorageError: trees cannot be written.
        """
        self._fleet.poll()
        for ref in self._ended():
            self._settle(ref)
        self._hear()
        self._hear_stats()
        if self.latest is not None and self.latest.failure:
            raise ServiceError(f"round {self._job.plan.round}: {self.latest.failure}")
        if self.latest is not None and self.latest.done and not self._growing:
            return True
        growing = {name for name, _ in self._growing.values()}
        for group in self._fleet.groups:
            if group.name not in growing:
                self._growing[group.shard.grow.remote(self._job, self._board)] = (group.name, group.shard)
        return False

    def stats(self) -> list[dict[str, dict[str, float]]]:
        """The newest counters of every shard that has answered; nobody is waited for."""
        return [known for _, known in self._stats.values() if known]

    def close(self) -> None:
        """End the growth: finished trees are made durable, which takes seconds; then the board goes."""
        self._stop_shards()
        self._fleet.watch.drop(BOARD)
        ray.kill(self._board)

    # ------------------------------------------------------------------ inside

    def _ended(self) -> list[Any]:
        refs = list(self._growing)
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []

    def _settle(self, ref: Any) -> None:
        """A shard's call of `grow` has ended, for whatever reason.

        A shard that could not be reached may live: it is ended, for it must not grow twice at once.
        """
        name, shard = self._growing.pop(ref)
        died = False
        try:
            get(ref, SETTLE_S, f"the end of {name}")
        except RayTaskError as error:
            if not isinstance(error.cause, RayActorError):
                raise
            # The board is dead; its watch makes another.
        except RayActorError:
            died = True
            ray.kill(shard)
            self._announce(name)
        self._board.give_back.remote(name, died)
        self._stats.pop(name, None)

    def _announce(self, name: str) -> None:
        """Tell the board of parts that a shard finished and did not live to announce."""
        for part, keys in mend_parts(self._job.trees, f"part-{name}-*.parquet", self.notes):
            self._board.durable.remote(Part(part, keys))

    def _hear(self) -> None:
        try:
            found = self._progress.poll(time.monotonic())
        except RayActorError:
            self.latest = None
            return
        if found is not None:
            if self.latest is None and found.note:
                self.notes.append(found.note)
            self.latest = found

    def _hear_stats(self) -> None:
        for group in self._fleet.groups:
            question, known = self._stats.get(group.name) or (Question(group.shard.stats.remote, STATS_S), {})
            try:
                known = question.poll(time.monotonic()) or known
            except (RayActorError, RayTaskError):
                self._stats.pop(group.name, None)  # of a shard that is being replaced
                continue
            self._stats[group.name] = (question, known)

    def _another_board(self) -> Any:
        """In a dead board's place; shards that grew for that one are stopped before."""
        self._stop_shards()
        self.latest = None
        self._board = self._new_board()
        self._fleet.watch.allow(BOARD, self._start_s)
        return self._board

    def _new_board(self) -> Any:
        """A board that knows the trees on disk."""
        parts = mended_parts(self._job.trees, wanted=self._problems)
        self.notes += parts.notes
        if parts.others:
            raise RunError(
                f"{self._job.trees} holds trees of {len(parts.others)} problems that round {self._job.plan.round} has "
                f"no longer: {listed(parts.others, 5)}. Give it the problems that it was begun with, or use another "
                f"run.name; or move {self._job.trees} away, and all of the round's trees are grown anew."
            )
        board, self._start_s = self._make_board(parts)
        return board

    def _stop_shards(self) -> None:
        """Have every shard make durable what it has finished; those that do not in time are ended."""
        if not self._growing:
            return
        for _, shard in self._growing.values():
            shard.stop.remote()
        refs = list(self._growing)
        late = ray.wait(refs, num_returns=len(refs), timeout=SETTLE_S)[1]
        for ref in late:
            ray.kill(self._growing[ref][1])
        if late:
            ray.wait(late, num_returns=len(late), timeout=SETTLE_S)
        self._growing.clear()
