"""The verifier: executes steps in sandboxed supervisors and grades answers. A plain async class that also
runs as a Ray actor: `ray.remote(SandboxVerifier).remote(config)`.

It holds the gold answers and is never forked from; supervisors are executed afresh, see no gold answer
of a problem whose code they run, and end when this process does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evolve.errors import EvolveError
from evolve.schema import VerifierConfig
from evolve.types import Outcome, Problem, Status, Verdict
from evolve.verify import cgroups
from evolve.verify.layers import ENVIRONMENT, Layers, detect
from evolve.verify.link import Link
from evolve.verify.nodes import digest
from evolve.verify.numerals import LONGEST, quick_equiv, quick_group, specific_first
from evolve.verify.remembered import Remembered
from evolve.verify.steps import CODE_BYTES, looks_plain, prefix_keys, refusal, server_kind, validate

SLOTS = 4
"""Steps a supervisor runs at once, so that one that sleeps does not hold up the others."""

ATTEMPTS = 3
"""Supervisors a request may lose before it counts as a failure of the sandbox."""

PROBE = "\\sqrt{2} + x"
"""A formula that any answer can be compared with: an answer that hangs against it hangs by itself."""

GRADE_WALL_S = 60.0
"""Least wall time of a grade. It computes and never sleeps, so that wall time says only how busy the machine is."""

CACHED_BYTES = 1 << 26
"""Of verdicts that are remembered, and of output digests."""


class GradingUnavailable(EvolveError):
    """Answers cannot be compared, for no reason of their own."""


class SandboxVerifier:
    """Executes steps and grades answers (the `Verifier` Protocol).

    Raises (from `start`, or the first request):
        SandboxUnavailable: a required isolation layer is missing on this machine.
    """

    def __init__(self, config: VerifierConfig, layers: Layers | None = None) -> None:
        """`layers`: what to isolate with; None: the strongest this machine has."""
        validate(config)
        self.config = config
        self.layers = layers
        self._links: list[Link] = []
        self._closed = False
        self._starting: asyncio.Lock | None = None
        self._room = asyncio.Semaphore(config.queue)
        self._counts: Counter[str] = Counter()
        self._verdicts: Remembered[Verdict] = Remembered(CACHED_BYTES)
        self._digests: Remembered[str] = Remembered(CACHED_BYTES)
        self._running: dict[str, asyncio.Future[Verdict]] = {}
        self._cpu_s = self._wall_s = 0.0

    # ------------------------------------------------------------------ life

    async def describe(self) -> dict[str, Any]:
        """`tier`, and `missing`: what this machine lacks and how to add it."""
        await self.start()
        assert self.layers is not None
        return {
            "tier": self.layers.tier,
            "missing": list(self.layers.missing),
            "supervisors": len(self._links),
        }

    async def start(self) -> None:
        """Start the supervisors; done by the first request otherwise. Interpreters start when needed."""
        if self._links:
            return
        if self._closed:
            raise RuntimeError("this verifier was closed")
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self._links:
                return
            if self.layers is None:
                self.layers = await asyncio.to_thread(detect)
            for lack in self.layers.missing:
                warnings.warn(f"the sandbox lacks a layer: {lack}", RuntimeWarning, stacklevel=2)
            count = self.config.supervisors or len(os.sched_getaffinity(0))
            links = [Link(self) for _ in range(count)]
            try:
                for link in links:
                    await self._launch(link)
            except BaseException:
                await self._end(links)
                raise
            self._links = links

    async def _launch(self, link: Link) -> None:
        """Execute a supervisor process and connect to it."""
        assert self.layers is not None
        ours, theirs = socket.socketpair()
        settings = {
            "layers": asdict(self.layers),
            "memory_mb": self.config.memory_mb,
            "cpu_s": int(max(self.config.cpu_s, self.config.grade_timeout_s)) + 2,
            "output_bytes": self.config.output_bytes,
            "snapshot_mb": self.config.snapshot_mb,
            "slots": SLOTS,
        }
        boot = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r});"
            "from evolve.verify.supervisor import main; main()"
        )
        try:
            link.process = subprocess.Popen(  # noqa: ASYNC220 (a few milliseconds, once)
                [sys.executable, "-P", "-c", boot, str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)

    def supervisor_died(self, link: Link) -> None:
        """Start another in its place, which gets the requests that were held."""
        link.transport = None
        if link.process is not None:
            link.process.kill()
            link.process.wait()
        if link.ended:
            for future, _, _ in link.held.values():
                if not future.done():
                    future.set_exception(RuntimeError("the verifier was closed"))
            link.held.clear()
            return
        self._counts["supervisor_restarts"] += 1
        held, link.held = link.held, {}
        link.received.clear()
        for number, (future, packet, attempts) in held.items():
            if attempts + 1 < ATTEMPTS:
                link.held[number] = (future, packet, attempts + 1)
            elif not future.done():
                future.set_result({"s": "infrastructure", "m": "its supervisor died", "cpu": 0.0, "wall": 0.0})
        link.relaunch = asyncio.get_running_loop().create_task(self._relaunch(link))

    async def _relaunch(self, link: Link) -> None:
        while True:
            try:
                await self._launch(link)
                break
            except OSError as error:  # No memory or descriptors just now.
                why = f"no supervisor can be started: {error}"
                for future, _, _ in link.held.values():
                    if not future.done():
                        future.set_result({"s": "infrastructure", "m": why, "cpu": 0.0, "wall": 0.0})
                link.held.clear()
                await asyncio.sleep(1.0)
        assert link.transport is not None
        for _, packet, _ in list(link.held.values()):
            link.transport.write(packet)

    async def close(self) -> None:
        """End all helper processes. Requests in flight fail with RuntimeError."""
        self._closed = True
        await self._end(self._links)
        if self.layers is not None and self.layers.cgroup is not None:
            await asyncio.to_thread(cgroups.clear, Path(self.layers.cgroup), 5.0)

    async def _end(self, links: Sequence[Link]) -> None:
        """End supervisors and wait until they have."""
        for link in links:
            link.ended = True
            if link.transport is not None:
                link.transport.abort()
            elif link.relaunch is not None:
                link.relaunch.cancel()
                for future, _, _ in link.held.values():
                    if not future.done():
                        future.set_exception(RuntimeError("the verifier was closed"))
        for link in links:
            if link.process is not None:
                link.process.kill()
                await asyncio.to_thread(link.process.wait)

    # ------------------------------------------------------------------ requests

    async def _request(self, problem_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the problem's supervisor and wait for its response."""
        await self.start()
        link = self._links[zlib.crc32(problem_id.encode("utf-8", "surrogatepass")) % len(self._links)]
        async with self._room:
            return await link.ask(fields)

    async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
        """Execute `step` in the interpreter state left by `parent`, the code of the steps before it.

        The same step after the same prefix of the same problem is executed once: its verdict is
        remembered, so that equal candidates share one state.
        """
        codes = (*parent, step)
        refused = refusal(codes)
        if refused is not None:
            self._counts["refused"] += 1
            return refused
        kind = server_kind(codes)
        keys = prefix_keys(problem.id, codes)
        key = keys[-1]
        known = self._verdicts.get(key)
        if known is not None:
            self._counts["repeated"] += 1
            return known
        running = self._running.get(key)
        if running is not None:
            self._counts["repeated"] += 1
            return await asyncio.shield(running)
        self._running[key] = task = asyncio.ensure_future(self.execute(problem.id, codes, kind, keys))
        try:
            verdict = await asyncio.shield(task)
        finally:
            if task.done():
                self._running.pop(key, None)
            else:
                task.add_done_callback(lambda _: self._running.pop(key, None))
        if verdict.status is Status.OK or (verdict.status is Status.ERROR and verdict.deterministic):
            self._verdicts.put(key, verdict, len(verdict.stdout) + len(verdict.message))
        return verdict

    async def execute(
        self,
        problem_id: str,
        codes: tuple[str, ...],
        kind: str,
        keys: list[str],
        cpu_s: float | None = None,
        wall_s: float | None = None,
        lane: bool = True,
    ) -> Verdict:
        """Execute `codes[-1]` without looking whether it was executed before.

        `kind`: the interpreter (see `steps.server_kind`). `lane`: whether plain arithmetic may share a process.
        """
        response = await self._request(
            problem_id,
            {
                "o": "C",
                "k": kind,
                "c": codes,
                "h": keys,
                "cpu": cpu_s or self.config.cpu_s,
                "wall": wall_s or self.config.wall_s,
                "a": lane and kind == "light" and all(map(looks_plain, codes)),
            },
        )
        verdict = Verdict(
            status=Status(response["s"]),
            stdout=response.get("o", ""),
            truncated=response.get("t", False),
            exception=response.get("e", ""),
            message=response.get("m", ""),
            line=response.get("l"),
            cpu_s=response["cpu"],
            wall_s=response["wall"],
        )
        replayed = response.get("d", ())
        if response.get("p"):
            # Only steps that were ok have others after them: this one's prefix is not what it was.
            verdict = replace(verdict, replayed=True, deterministic=False)
            self._counts["nondeterministic"] += 1
        elif replayed:
            changed = any(self._digests.get(keys[i]) not in (None, found) for i, found in replayed)
            verdict = replace(verdict, replayed=True, deterministic=not changed)
            self._counts["nondeterministic"] += changed
            for index, found in replayed:
                if self._digests.get(keys[index]) is None:
                    self._digests.put(keys[index], found)
        self._counts[verdict.status] += 1
        self._cpu_s += verdict.cpu_s
        self._wall_s += verdict.wall_s
        if verdict.status is Status.OK:
            self._digests.put(keys[-1], digest(verdict.stdout))
        return verdict

    async def check_many(self, requests: Sequence[tuple[Problem, tuple[str, ...], str]]) -> list[Verdict]:
        """`check` for each of many requests, at once; one call over the network for a Ray caller."""
        return list(await asyncio.gather(*(self.check(*request) for request in requests)))

    # ------------------------------------------------------------------ grading

    async def grade(self, problem: Problem, answer: str) -> Outcome:
        """Compare `answer` with the problem's gold alternatives; equal to any one is correct."""
        self._counts["grades"] += 1
        outcome = Outcome.WRONG
        for gold in problem.answers:
            equal = quick_equiv(gold, answer)
            if equal is None:
                try:
                    found = await self._compare(problem.id, "G", [[gold.strip(), answer.strip()]])
                except GradingUnavailable:
                    outcome = Outcome.INFRASTRUCTURE
                    continue
                if found is None and outcome is Outcome.WRONG:
                    outcome = Outcome.TIMEOUT
                equal = found == [1]
            if equal:
                return Outcome.CORRECT
        if outcome is not Outcome.WRONG:
            self._counts[f"grade_{outcome}"] += 1
        return outcome

    async def grade_many(self, requests: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """`grade` for each of many requests, at once."""
        return list(await asyncio.gather(*(self.grade(*request) for request in requests)))

    async def group(self, answers: Sequence[str]) -> list[int]:
        """For each answer the index of the first of its group of equal ones (see `numerals.group_by`).

        Answers that are longer than `LONGEST`, or the longest of more than fit one packet, equal identical ones only.

        Raises:
            GradingUnavailable: the sandbox cannot compare answers.
        """
        quick, standing = quick_group(answers)
        places = {answers[index].strip(): quick[index] for index in standing}
        short = sorted((text for text in places if len(text) <= LONGEST), key=lambda text: (len(text), text))
        texts = sorted(packets(short)[0], key=specific_first)
        if len(texts) < 2:
            return quick
        groups = await self._compare("group:" + texts[0], "P", texts)
        if groups is None:
            groups = await self._group_apart(texts)
        first: dict[int, int] = {}
        for text, group in zip(texts, groups, strict=True):
            first[group] = min(places[text], first.get(group, len(answers)))
        merged = {places[text]: first[group] for text, group in zip(texts, groups, strict=True)}
        return [merged.get(index, index) for index in quick]

    async def _group_apart(self, texts: list[str]) -> list[int]:
        """Group where some comparison hangs. Answers that hang against anything stand alone; the rest is
        grouped again without them, so that one such answer costs two time limits and not one for each pair."""
        probes = await asyncio.gather(
            *(self._compare(f"group:{index}:{text}", "G", [[text, PROBE]]) for index, text in enumerate(texts))
        )
        sound = [index for index, probe in enumerate(probes) if probe is not None]
        rest = [texts[index] for index in sound]
        groups: list[int] | None = None
        if 0 < len(rest) < len(texts):
            groups = await self._compare("group:" + rest[0], "P", rest)
        if groups is None:
            groups = await self._group_one_by_one(rest)
        result = list(range(len(texts)))
        for place, index in enumerate(sound):
            result[index] = sound[groups[place]]
        return result

    async def _group_one_by_one(self, texts: list[str]) -> list[int]:
        """Group with children, and so time limits, for each answer; the same groups as `group_by` makes."""
        standing: list[int] = []
        result: list[int] = []
        for index, text in enumerate(texts):
            equal: list[int] = []
            for packet in packets([[texts[other], text] for other in standing]):
                equal += await self._compare_pairs(packet)
            found = next((other for other, same in zip(standing, equal, strict=True) if same), index)
            if found == index:
                standing.append(index)
            result.append(found)
        return result

    async def _compare_pairs(self, pairs: list[list[str]]) -> list[int]:
        """Whether each pair is equal. A pair that does not end when it has a limit to itself is taken for unequal."""
        equal = await self._compare("group:" + pairs[0][1], "G", pairs) if pairs else []
        if equal is not None:
            return equal
        half = len(pairs) // 2
        return [*await self._compare_pairs(pairs[:half]), *await self._compare_pairs(pairs[half:])] if half else [0]

    async def _compare(self, problem_id: str, verb: str, data: list[Any]) -> list[int] | None:
        """Have a killable child compare `data`; its integers, or None: it did not come to an end.

        Raises:
            GradingUnavailable: for the sandbox's own reasons.
        """
        limit = self.config.grade_timeout_s
        times = {"cpu": limit, "wall": max(GRADE_WALL_S, 4 * limit)}
        text = json.dumps(data, ensure_ascii=False)
        response = await self._request(problem_id, {"o": verb, "k": "grade", "c": [text], "h": [""], **times})
        if response["s"] == "infrastructure":
            raise GradingUnavailable(f"the sandbox cannot compare answers: {response['m']}")
        return [int(value) for value in response["g"]] if response["s"] == "ok" else None

    async def stats(self) -> dict[str, float]:
        """Counters since the start, and gauges summed over the supervisors."""
        total: Counter[str] = Counter()
        for link in self._links:
            if link.transport is not None:
                total.update((await link.ask({"o": "S"})).get("stats", {}))
        total.update({name: value for name, value in self._counts.items() if name not in total})
        return {**total, "cpu_s": self._cpu_s, "wall_s": self._wall_s}


def packets(items: Sequence[Any]) -> list[list[Any]]:
    """`items`, to be sent as JSON, in lists of which each fits one packet."""
    made: list[list[Any]] = [[]]
    room = CODE_BYTES - 2
    for item in items:
        size = len(json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")) + 2
        if size > room:
            made.append([])
            room = CODE_BYTES - 2
        made[-1].append(item)
        room -= size
    return made
