"""One driver a run directory, on a disk or in an object store: who is refused, and who takes over."""

import json
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolve.errors import StorageError
from evolve.remote import RemotePath
from evolve.store import lease, lock
from evolve.store.lease import Lease, driver_lock
from evolve.store.lock import STALE_S, DriverLock, Lock, stop_this_process
from evolve.store.run import RunDirectory, RunError
from tests.object_store.use import environment, objects_at


class Scene(ABC):
    """A run directory, and the locks that are left in it."""

    run: RunDirectory

    def lock(self, on_lost: Callable[[str], None] = stop_this_process) -> DriverLock:
        return Lock(self.run, on_lost) if isinstance(self.run.path, Path) else Lease(self.run.path, on_lost)

    @abstractmethod
    def left_by_another(self, age_s: float = 0.0, number: int = 1, **changes: object) -> None:
        """The lock of another driver, whose last heartbeat was so long ago."""

    @abstractmethod
    def own(self) -> Path:
        """The file of the first lock that was taken."""

    @abstractmethod
    def check_released(self) -> None:
        """What is left of one lock that was taken and given back."""

    @abstractmethod
    def check_kept(self) -> None:
        """The lock of another driver was not touched."""


class OnDisk(Scene):
    def __init__(self, directory: Path) -> None:
        self.run = RunDirectory(directory)

    def own(self) -> Path:
        return Path(str(self.run.path), "lock.json")

    def left_by_another(self, age_s: float = 0.0, number: int = 1, **changes: object) -> None:
        self.own().write_text(json.dumps({**lock.me(), "token": "theirs", **changes}))
        os.utime(self.own(), (time.time() - age_s,) * 2)

    def check_released(self) -> None:
        assert list(self.own().parent.iterdir()) == []

    def check_kept(self) -> None:
        assert self.own().exists()


class InStore(Scene):
    def __init__(self, bucket: RemotePath) -> None:
        self.bucket = bucket
        self.run = RunDirectory(bucket)

    def file(self, number: int) -> Path:
        return Path(self.bucket.uri.removeprefix("objects://"), f"lock-{number:08}.json")

    def own(self) -> Path:
        return self.file(1)

    def left_by_another(self, age_s: float = 0.0, number: int = 1, **changes: object) -> None:
        content = json.dumps({**lock.me(), "token": "theirs", **changes})
        (self.bucket / f"lock-{number:08}.json").put(content.encode())
        os.utime(self.file(number), (time.time() - age_s,) * 2)

    def holders(self) -> list[dict[str, object]]:
        return [json.loads(path.read_bytes()) for path in self.bucket.glob("*")]

    def check_released(self) -> None:
        assert [holder["released"] for holder in self.holders()] == [True], "those that were outnumbered are gone"

    def check_kept(self) -> None:
        assert [holder.get("released") for holder in self.holders() if holder["host"] == "elsewhere"] == [None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InStore:
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    return InStore(objects_at(tmp_path, monkeypatch))


@pytest.fixture(params=["disk", "store"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return OnDisk(tmp_path) if request.param == "disk" else request.getfixturevalue("store")


def test_the_kind_of_lock_follows_the_place(tmp_path: Path, store: InStore) -> None:
    assert isinstance(driver_lock(RunDirectory(tmp_path)), Lock)
    assert isinstance(driver_lock(store.run), Lease)


def test_a_second_driver_is_refused_and_told_who_the_first_is(scene: Scene) -> None:
    first = scene.lock()
    first.acquire()
    with pytest.raises(RunError, match=rf"in use by another driver: host .*, process {os.getpid()}, since 2.*kill"):
        scene.lock().acquire()
    first.release()
    first.release()
    second = scene.lock()
    second.acquire()
    second.release()
    scene.check_released()


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(scene: Scene) -> None:
    code = (
        "import os, sys; from evolve.files import place; from evolve.store.lease import driver_lock;"
        "from evolve.store.run import RunDirectory; driver_lock(RunDirectory(place(sys.argv[1]))).acquire();"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(scene.run.path)], check=False, env=environment())
    assert scene.own().exists()
    lock = scene.lock()
    lock.acquire()
    lock.release()


def test_a_process_that_has_the_dead_drivers_number_does_not_hold_its_lock(scene: Scene) -> None:
    scene.left_by_another(pid=os.getppid(), process_started=1.0)
    lock = scene.lock()
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"processes": "pid:[another container]"}])
def test_the_lock_of_another_host_is_taken_over_only_once_its_heartbeat_has_stopped(
    scene: Scene, other: dict[str, Any]
) -> None:
    scene.left_by_another(STALE_S - 30, pid=1, **other)
    with pytest.raises(RunError, match=r"process 1, .* run this again in \d+ s"):
        scene.lock().acquire()
    scene.left_by_another(STALE_S + 5, pid=1, **other)
    lock = scene.lock()
    lock.acquire()
    lock.release()
    scene.check_released()


def together(scene: Scene, count: int) -> list[DriverLock]:
    """Those of so many drivers that got the run at once."""
    got: list[DriverLock] = []
    start = threading.Barrier(count)

    def take() -> None:
        lock = scene.lock()
        start.wait()
        try:
            lock.acquire()
        except RunError:
            return
        got.append(lock)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_drivers_at_once_one_gets_the_run(scene: Scene, stale: bool) -> None:
    if stale:
        scene.left_by_another(STALE_S + 5, host="elsewhere")
    (got,) = together(scene, 8)
    got.release()
    scene.check_released()


def test_where_nothing_can_be_put_on_condition_the_last_to_put_gets_the_run(
    store: InStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(path: RemotePath, content: bytes) -> bool:
        path.put(content)
        return True

    monkeypatch.setattr(lease, "SETTLE_S", 1.0)
    monkeypatch.setattr(RemotePath, "create", create)
    (got,) = together(store, 4)
    got.release()


def test_a_driver_whose_lock_was_taken_over_is_told_and_leaves_the_others_lock(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    lost = threading.Event()
    reasons: list[str] = []

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    mine = scene.lock(on_lost)
    mine.acquire()
    before = scene.own().stat().st_mtime
    time.sleep(0.2)
    assert scene.own().stat().st_mtime > before, "the heartbeat"
    scene.left_by_another(number=2, host="elsewhere", pid=7)
    assert lost.wait(10)
    assert "taken over by host elsewhere, process 7" in reasons[0]
    mine.release()
    scene.check_kept()


def test_a_store_that_is_away_for_a_moment_does_not_end_the_driver(
    store: InStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    reasons: list[str] = []
    mine = store.lock(reasons.append)
    mine.acquire()
    monkeypatch.setenv("OBJECTS_AWAY", "1")
    time.sleep(0.2)
    with pytest.raises(StorageError):
        store.bucket.exists()
    monkeypatch.delenv("OBJECTS_AWAY")
    time.sleep(0.2)
    before = store.own().stat().st_mtime
    time.sleep(0.2)
    assert store.own().stat().st_mtime > before
    assert reasons == []
    mine.release()
