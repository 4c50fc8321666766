"""One driver a run directory in an object store: who is refused, and who takes over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evolve.errors import StorageError
from evolve.remote import RemotePath
from evolve.store import lease as module
from evolve.store import lock
from evolve.store.lease import Lease, driver_lock
from evolve.store.lock import STALE_S, Lock
from evolve.store.run import RunDirectory, RunError
from tests.object_store.use import environment, objects_at


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    return objects_at(tmp_path, monkeypatch)


def left_by_another(run: RemotePath, age_s: float = 0.0, number: int = 1, **changes: object) -> Path:
    """The lock of another driver, last put so long ago."""
    path = run / f"lock-{number:08}.json"
    path.put(json.dumps({**lock.me(), "token": "theirs", **changes}).encode())
    file = Path(path.uri.removeprefix("objects://"))
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def holders(run: RemotePath) -> list[dict[str, object]]:
    return [json.loads(path.read_bytes()) for path in run.glob("*")]


def test_the_kind_of_lock_follows_the_place(tmp_path: Path, run: RemotePath) -> None:
    assert isinstance(driver_lock(RunDirectory(tmp_path)), Lock)
    assert isinstance(driver_lock(RunDirectory(run)), Lease)


def test_a_second_driver_is_refused_and_told_who_the_first_is(run: RemotePath) -> None:
    first = Lease(run)
    first.acquire()
    with pytest.raises(RunError, match=rf"in use by another driver: host .*, process {os.getpid()}, since 2.*kill"):
        Lease(run).acquire()
    first.release()
    first.release()
    second = Lease(run)
    second.acquire()
    second.release()
    assert [holder["released"] for holder in holders(run)] == [True]


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(run: RemotePath) -> None:
    code = (
        "import os, sys; from evolve.files import place; from evolve.store.lease import Lease;"
        "Lease(place(sys.argv[1])).acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=False, env=environment())
    assert len(holders(run)) == 1
    lease = Lease(run)
    lease.acquire()
    lease.release()


def test_a_process_that_has_the_dead_drivers_number_does_not_hold_its_lock(run: RemotePath) -> None:
    left_by_another(run, pid=os.getppid(), process_started=1.0)
    lease = Lease(run)
    lease.acquire()
    lease.release()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"processes": "pid:[another container]"}])
def test_the_lock_of_another_host_is_taken_over_only_once_its_heartbeat_has_stopped(
    run: RemotePath, other: dict[str, str]
) -> None:
    left_by_another(run, STALE_S - 30, pid=1, **other)
    with pytest.raises(RunError, match=r"process 1, .* run this again in \d+ s"):
        Lease(run).acquire()
    left_by_another(run, STALE_S + 5, pid=1, **other)
    lease = Lease(run)
    lease.acquire()
    lease.release()
    assert len(holders(run)) == 1, "the one that was outnumbered is gone"


def together(run: RemotePath, count: int) -> list[Lease]:
    """Those of so many drivers that got the run at once."""
    got: list[Lease] = []
    start = threading.Barrier(count)

    def take() -> None:
        lease = Lease(run)
        start.wait()
        try:
            lease.acquire()
        except RunError:
            return
        got.append(lease)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_drivers_at_once_one_gets_the_run(run: RemotePath, stale: bool) -> None:
    if stale:
        left_by_another(run, STALE_S + 5, host="elsewhere")
    got = together(run, 8)
    assert len(got) == 1
    got[0].release()


def test_where_nothing_can_be_put_on_condition_the_last_to_put_gets_the_run(
    run: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(path: RemotePath, content: bytes) -> bool:
        path.put(content)
        return True

    monkeypatch.setattr(module, "SETTLE_S", 1.0)
    monkeypatch.setattr(RemotePath, "create", create)
    got = together(run, 4)
    assert len(got) == 1
    got[0].release()


def test_a_driver_whose_run_was_taken_over_is_told_and_leaves_the_others_lock(
    run: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    lost = threading.Event()
    reasons: list[str] = []

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    lease = Lease(run, on_lost)
    lease.acquire()
    before = (run / "lock-00000001.json").modified()
    time.sleep(0.2)
    assert (run / "lock-00000001.json").modified() > before, "the heartbeat"
    left_by_another(run, number=2, host="elsewhere", pid=7)
    assert lost.wait(10)
    assert "taken over by host elsewhere, process 7" in reasons[0]
    lease.release()
    assert [holder.get("released") for holder in holders(run) if holder["host"] == "elsewhere"] == [None]


def test_a_store_that_is_away_for_a_moment_does_not_end_the_driver(
    run: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    reasons: list[str] = []
    lease = Lease(run, reasons.append)
    lease.acquire()
    monkeypatch.setenv("OBJECTS_AWAY", "1")
    time.sleep(0.2)
    with pytest.raises(StorageError):
        run.exists()
    monkeypatch.delenv("OBJECTS_AWAY")
    time.sleep(0.2)
    before = (run / "lock-00000001.json").modified()
    time.sleep(0.2)
    assert (run / "lock-00000001.json").modified() > before
    assert reasons == []
    lease.release()
