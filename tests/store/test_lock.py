"""One driver a run directory: who is refused, and whose lock is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evolve.store import lock as module
from evolve.store.lock import STALE_S, Lock
from evolve.store.run import RunDirectory, RunError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def lock_file(run: RunDirectory, age_s: float = 0.0, **changes: object) -> Path:
    """A lock as another driver left it."""
    path = run.path / "lock.json"
    path.write_text(json.dumps({**module.me(), "token": "theirs", **changes}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_second_driver_is_refused_and_told_who_the_first_is(run: RunDirectory) -> None:
    first = Lock(run)
    first.acquire()
    with pytest.raises(RunError, match=rf"in use by another driver: host .*, process {os.getpid()}, since 2.*kill"):
        Lock(run).acquire()
    first.release()
    second = Lock(run)
    second.acquire()
    second.release()
    assert list(run.path.iterdir()) == []


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(run: RunDirectory) -> None:
    code = (
        "import os, sys; from pathlib import Path; from evolve.store.lock import Lock;"
        "from evolve.store.run import RunDirectory; Lock(RunDirectory(Path(sys.argv[1]))).acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert (run.path / "lock.json").exists()
    lock = Lock(run)
    lock.acquire()
    lock.release()


def test_a_process_that_has_the_dead_drivers_number_does_not_hold_its_lock(run: RunDirectory) -> None:
    lock_file(run, pid=os.getppid(), process_started=1.0)
    lock = Lock(run)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"processes": "pid:[another container]"}])
def test_the_lock_of_another_host_is_taken_over_only_once_its_heartbeat_has_stopped(
    run: RunDirectory, other: dict[str, str]
) -> None:
    path = lock_file(run, STALE_S - 30, pid=1, **other)
    with pytest.raises(RunError, match=r"process 1, .* run this again in \d+ s"):
        Lock(run).acquire()
    os.utime(path, (time.time() - STALE_S - 5,) * 2)
    lock = Lock(run)
    lock.acquire()
    lock.release()


def test_of_many_drivers_that_find_a_stale_lock_one_gets_it(run: RunDirectory) -> None:
    lock_file(run, STALE_S + 5, host="elsewhere")
    got: list[Lock] = []
    start = threading.Barrier(8)

    def take() -> None:
        lock = Lock(run)
        start.wait()
        try:
            lock.acquire()
        except RunError:
            return
        got.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()
    assert list(run.path.iterdir()) == []


def test_a_driver_whose_lock_was_taken_over_is_told_and_leaves_the_others_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    lost = threading.Event()
    reasons: list[str] = []

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    lock = Lock(run, on_lost)
    lock.acquire()
    before = (run.path / "lock.json").stat().st_mtime
    time.sleep(0.2)
    assert (run.path / "lock.json").stat().st_mtime > before, "the heartbeat"
    lock_file(run, host="elsewhere", pid=7)
    assert lost.wait(10)
    assert "taken over by host elsewhere, process 7" in reasons[0]
    lock.release()
    assert (run.path / "lock.json").exists()
