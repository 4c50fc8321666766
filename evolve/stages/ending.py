"""How a run ends before its time: in good order on a signal, at once on a second one, and with the Ray it needs.

A signal may be meant for a whole process group or control group (`scancel`, systemd), so that Ray's own processes get
it too. Calls to a Ray that is gone would hang for a minute, and then end the process without a word.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable

import psutil

from evolve import cluster
from evolve.errors import EvolveError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 1.0
HEAD_LOOK_S = 2.0
"""Between two looks at a head that this run has joined; each takes a second at most."""
MISSES = 5
"""Looks in a row at which a head did not answer, after which it counts as dead: 10 to 15 s."""
_told = 0
"""The signal that this process was told to stop by."""


def obey_signals() -> None:
    """From now on raise KeyboardInterrupt on the first signal; a second one, of either kind, ends the process."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    global _told
    _told = number
    for each in SIGNALS:
        signal.signal(each, _stop_at_once)
    print("\nstopping: finished trees are made durable; once more to stop at once", file=sys.stderr)
    raise KeyboardInterrupt


def _stop_at_once(number: int, frame: object) -> None:
    """Leave everything as it is, for what has its final name is whole; some of Ray would outlive this by a minute."""
    _kill(psutil.Process().children(recursive=True))
    os._exit(128 + number)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Lifeline:
    """Ends this process when the Ray that it has started is dead, or the head of the cluster that it has joined."""

    def __init__(self, last_act: Callable[[], None], safe: Callable[[], str]) -> None:
        """`last_act` is called before the end; `safe` says what is kept."""
        self._last_act, self._safe = last_act, safe
        self._head = cluster.joined_head()
        self._daemons = [] if self._head else psutil.Process().children(recursive=True)
        """Of the Ray that was started; some of them outlive the others by a minute."""
        self._missed = 0
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lifeline", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """From now on that Ray may end."""
        self._cut.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._cut.wait(LOOK_S if self._head is None else HEAD_LOOK_S):
            if dead := self._dead():
                self._end(dead)

    def _dead(self) -> str:
        """What is dead of Ray; empty: nothing."""
        if self._head is None:
            return " and ".join(cluster.dead_daemons())
        self._missed = 0 if cluster.answers(self._head) else self._missed + 1
        return "head at {}:{}".format(*self._head) if self._missed >= MISSES else ""

    def _end(self, dead: str) -> None:
        why = "as it was told to stop" if _told else "which this run needs"
        try:
            for act in (lambda: f"\nstopped: Ray's {dead} ended, {why}", self._safe, self._last_act):
                try:
                    said = act()
                except (EvolveError, OSError) as error:  # a cut manifest, or storage that is away too
                    said = str(error)
                if said:
                    print(said, file=sys.stderr, flush=True)
        finally:
            _kill(self._daemons)
            os._exit(128 + _told if _told else 1)
