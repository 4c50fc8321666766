"""The verifier actor's end of the connection to one supervisor process."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from evolve.verify.service import SandboxVerifier


class Link(asyncio.Protocol):
    """The connection to one supervisor process: frames out, frames in, and the requests it holds."""

    def __init__(self, owner: SandboxVerifier, index: int) -> None:
        self.owner, self.index = owner, index
        self.held: dict[int, tuple[asyncio.Future[dict[str, Any]], bytes, int]] = {}
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None
        self.relaunch: asyncio.Task[None] | None = None
        self.process: subprocess.Popen[bytes] | None = None

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

    def send(self, number: int, packet: bytes, future: asyncio.Future[dict[str, Any]], attempts: int) -> None:
        self.held[number] = (future, packet, attempts)
        if self.transport is not None:
            self.transport.write(packet)
