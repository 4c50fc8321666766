"""Coalesced calls to actors: every call has its own answer, error and deadline; a dead actor's calls are sent again."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from evolve.service import ServiceClient, ServiceError, ServiceHost

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Echo:
    """Answers, fails, sleeps, or dies once."""

    def __init__(self, marker: Path | None = None) -> None:
        self.marker = marker
        self.digest = "first"
        self.reloads: list[str] = []

    async def echo(self, value: int) -> int:
        await asyncio.sleep(0.001 * (value % 7))
        return value

    async def fail(self, value: int) -> int:
        raise ValueError(f"no {value}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def die_once(self, value: int) -> int:
        if self.marker is not None and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return value

    async def reload(self, path: str, digest: str) -> None:
        self.reloads.append(path)
        self.digest = digest

    async def serving(self, value: int) -> str:
        return self.digest


def host(marker: Path | None = None) -> Any:
    import ray

    return ray.remote(ServiceHost).options(num_cpus=0, max_concurrency=100, max_restarts=2).remote(lambda: Echo(marker))


def test_many_calls_at_once_each_get_their_own_answer() -> None:
    async def run() -> list[int]:
        client = ServiceClient(host(), "echo", 60)
        return await asyncio.gather(*(client.call("echo", value) for value in range(500)))

    assert asyncio.run(run()) == list(range(500))


def test_an_error_reaches_its_own_caller_only() -> None:
    async def run() -> list[Any]:
        client = ServiceClient(host(), "echo", 60)
        calls = [client.call("fail" if value == 3 else "echo", value) for value in range(6)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    assert isinstance(answers[3], ValueError)
    assert [answers[i] for i in (0, 1, 2, 4, 5)] == [0, 1, 2, 4, 5]


def test_a_call_that_is_not_answered_in_time_names_the_actor_and_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        client = ServiceClient(host(), "the slow one", 0.5)
        await client.call("sleep", 60)

    started = time.monotonic()
    with pytest.raises(ServiceError, match="the slow one has not answered `sleep`"):
        asyncio.run(run())
    assert time.monotonic() - started < 30


def test_calls_held_by_an_actor_that_dies_are_sent_again(tmp_path: Path) -> None:
    async def run() -> list[int]:
        client = ServiceClient(host(tmp_path / "died"), "mortal", 120)
        calls = [client.call("echo", value) for value in range(20)]
        return await asyncio.gather(*calls, client.call("die_once", 99))

    assert asyncio.run(run()) == [*range(20), 99]
    assert (tmp_path / "died").exists()


def test_a_restarted_engine_serves_the_checkpoint_it_is_asked_for(tmp_path: Path) -> None:
    async def run() -> list[str]:
        client = ServiceClient(host(tmp_path / "died"), "engine", 120, expects=("/checkpoint", "second"))
        before = await client.call("serving", 0)
        await client.call("die_once", 1)
        return [before, await client.call("serving", 0)]

    assert asyncio.run(run()) == ["second", "second"]


def test_a_pulse_says_which_checkpoint_is_served_and_is_felt_before_the_service_has_started() -> None:
    import ray

    actor = host()
    before = ray.get(actor.pulse.remote(), timeout=120)
    assert before.serving is None
    ray.get(actor.start.remote(("/checkpoint", "second")), timeout=120)
    after = ray.get(actor.pulse.remote(), timeout=120)
    assert (after.serving, after.pid) == ("second", before.pid)
    assert Path(after.log).is_file()


def test_an_actor_that_is_not_back_in_time_is_an_error_that_names_it() -> None:
    import ray

    async def run() -> None:
        actor = host()
        client = ServiceClient(actor, "the lost one", 60)
        await client.call("echo", 1)
        client.start_timeout_s = 3
        ray.kill(actor)
        await client.call("echo", 2)

    with pytest.raises(ServiceError, match="the lost one died and was not back within 3 s"):
        asyncio.run(run())


def test_an_error_of_the_other_side_that_is_for_the_user_comes_without_rays_traceback() -> None:
    import ray

    from evolve.files import StorageError
    from evolve.service import get

    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError) as caught:
        get(fail.remote(), 120, "a task")
    assert str(caught.value) == "the disk is full"
