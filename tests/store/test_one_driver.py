"""One driver a run directory, on a disk or in an object store: who is refused, and who takes over."""

import json
import os
import re
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
    @abstractmethod
    def give_back(self) -> None:
        """The other driver ends in good order."""

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

    def give_back(self) -> None:
        self.own().unlink()

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

    def give_back(self) -> None:
        self.left_by_another(host="elsewhere", released=True)

    def check_released(self) -> None:
        assert [holder["released"] for holder in self.holders()] == [True], "those that were outnumbered are gone"

    def check_kept(self) -> None:
        assert [holder.get("released") for holder in self.holders() if holder["token"] == "theirs"] == [None]


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


OTHERS = [{"host": "elsewhere"}, {"boot": "a clone of this machine"}, {"processes": "pid:[another container]"}]


@pytest.mark.parametrize("other", OTHERS)
def test_a_driver_elsewhere_that_shows_a_sign_of_life_keeps_its_lock(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
) -> None:
    """Whether a process of that number lives here means nothing."""
    scene.left_by_another(STALE_S - 29, pid=1, process_started=1.0, **other)
    pauses = iter([lambda: None, lambda: os.utime(scene.own())])
    monkeypatch.setattr(lock, "pause", lambda: next(pauses)())
    with pytest.raises(RunError, match=r"in use by another driver: .*, process 1, .* end it there"):
        scene.lock().acquire()
    assert next(pauses, None) is None
    scene.check_kept()
    assert re.search(r"process 1, since .*\) 91 s ago\. .* taken over in (29|28) s", capsys.readouterr().err)


@pytest.mark.parametrize("other", OTHERS)
def test_a_driver_elsewhere_whose_heartbeat_has_stopped_is_waited_for_and_then_taken_over(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    """As after a node was lost: what starts the run again does so once."""
    beat = time.time() - STALE_S + 30
    scene.left_by_another(pid=1, **other)
    os.utime(scene.own(), (beat, beat))
    pauses = []

    def time_passes() -> None:
        pauses.append(len(pauses))
        monkeypatch.setattr(lock, "STALE_S", lock.STALE_S - 20)

    monkeypatch.setattr(lock, "pause", time_passes)
    mine = scene.lock()
    mine.acquire()
    mine.release()
    assert pauses == [0, 1]
    scene.check_released()


def test_a_driver_elsewhere_that_gives_its_lock_back_is_followed_at_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.left_by_another(host="elsewhere")
    monkeypatch.setattr(lock, "pause", scene.give_back)
    mine = scene.lock()
    mine.acquire()
    mine.release()


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


def test_a_driver_that_was_late_to_find_a_lock_stale_leaves_the_one_that_has_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = OnDisk(tmp_path)
    scene.left_by_another(STALE_S + 5, host="elsewhere")
    winner = scene.lock()
    wait = lock.wait_until_stale

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(lock, "wait_until_stale", wait)
        found = wait(*arguments)
        winner.acquire()
        return found

    monkeypatch.setattr(lock, "wait_until_stale", late)
    with pytest.raises(RunError, match="in use by another driver"):
        scene.lock().acquire()
    assert list(tmp_path.iterdir()) == [scene.own()], "no claim is left"
    winner.release()
    scene.check_released()


def test_a_claim_on_a_stale_lock_that_its_driver_died_with_is_forgotten(tmp_path: Path) -> None:
    scene = OnDisk(tmp_path)
    scene.left_by_another(STALE_S + 5, host="elsewhere")
    claim = tmp_path / "lock.json.theirs"
    claim.touch()
    with pytest.raises(RunError, match="at the same moment"):
        scene.lock().acquire()
    os.utime(claim, (time.time() - STALE_S - 5,) * 2)
    mine = scene.lock()
    mine.acquire()
    mine.release()
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
