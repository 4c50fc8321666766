"""An engine whose vLLM does not answer, with a pretended vLLM."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve.policy import serving
from evolve.policy.serving import Engine
from evolve.schema import EngineConfig
from evolve.service import ServiceClient, ServiceError, ServiceHost


class Pretended(Engine):
    """Answers with the number of its process; where `model` is no file yet it writes that into it and hangs."""

    async def start(self) -> str:
        self._llm = SimpleNamespace(errored=False)
        self.digest = "digest"
        return self.digest

    async def ask(self) -> int:
        return int(await self._run(1, self._stream))

    async def _stream(self) -> AsyncIterator[int]:
        if self._first():
            await asyncio.Event().wait()
        yield os.getpid()

    def _first(self) -> bool:
        marker = Path(self.path)
        first = not marker.exists()
        if first:
            marker.write_text(str(os.getpid()))
        return first

    def _exit_if_dead(self, error: BaseException) -> None:
        """Its core lives."""


def engine(model: Path) -> Pretended:
    return Pretended(str(model), EngineConfig(request_timeout_s=0.2))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has an entry for every time that the actor's process would have been ended."""
    found: list[str] = []
    monkeypatch.setattr(serving, "_end_actor", lambda: found.append("ended"))
    return found


async def test_an_engine_that_answers_nothing_in_time_ends_its_actor(tmp_path: Path, ended: list[str]) -> None:
    made = engine(tmp_path / "hang")
    await made.start()
    with pytest.raises(ServiceError, match=r"the engine of .*hang has not answered a request for 0 s"):
        await made.ask()
    assert ended == ["ended"]
    assert (await made.stats())["running"] == 0


async def test_an_engine_that_answers_others_stays_and_the_late_request_is_an_error(
    tmp_path: Path, ended: list[str]
) -> None:
    made = engine(tmp_path / "hang")
    await made.start()
    late = asyncio.create_task(made.ask())
    while not (tmp_path / "hang").exists():  # noqa: ASYNC110 (nothing tells that it has begun)
        await asyncio.sleep(0)
    assert await made.ask() == os.getpid()
    with pytest.raises(ServiceError):
        await late
    assert ended == []


async def test_a_core_that_died_is_found_when_a_request_is_late(
    tmp_path: Path, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: Any = SimpleNamespace(EngineDeadError=type("EngineDeadError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", errors)
    monkeypatch.setattr(Pretended, "_exit_if_dead", Engine._exit_if_dead)
    made = engine(tmp_path / "hang")
    await made.start()
    made._answered = float("inf")
    made._llm.errored = True
    with pytest.raises(ServiceError):
        await made.ask()
    assert ended == ["ended"]


def test_a_request_to_an_engine_that_hangs_is_answered_by_the_one_that_ray_starts_in_its_place(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    async def run() -> int:
        host = ray.remote(ServiceHost).options(num_cpus=0, max_concurrency=100, max_restarts=1)
        return int(await ServiceClient(host.remote(lambda: engine(tmp_path / "hang")), "engine", 120).call("ask"))

    assert asyncio.run(run()) not in (os.getpid(), int((tmp_path / "hang").read_text()))
