"""The verifier actor's end of the connection to one supervisor process."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
import subprocess
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from evolve.verify.service import SandboxVerifier


class Link(asyncio.Protocol):
    """The connection to one supervisor process: frames out, frames in, and the requests it holds."""

    def __init__(self, owner: SandboxVerifier) -> None:
        self.owner = owner
        self.numbers = itertools.count()
        self.held: dict[int, tuple[asyncio.Future[dict[str, Any]], bytes, int]] = {}
        """Future, bytes and number of processes lost, of each request that has no response yet."""
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None
        self.relaunch: asyncio.Task[None] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.ended = False
        """Its owner has ended it, and wants no other in its place."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an isinstance check: the transports of uvloop, which Ray actors run on, are of no asyncio class.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        start = 0
        while len(self.received) - start >= 4:
            (size,) = struct.unpack_from(">I", self.received, start)
            if len(self.received) - start < 4 + size:
                break
            body = json.loads(self.received[start + 4 : start + 4 + size])
            start += 4 + size
            future, _, _ = self.held.pop(body["i"])
            if not future.done():
                future.set_result(body)
        del self.received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.supervisor_died(self)

    async def ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Send a request, now or when there is a process again, and wait for its response."""
        number = next(self.numbers)
        body = json.dumps({**fields, "i": number}, separators=(",", ":")).encode()
        packet = struct.pack(">I", len(body)) + body
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.held[number] = (future, packet, 0)
        if self.transport is not None:
            self.transport.write(packet)
        return await future
