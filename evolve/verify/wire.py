"""The connection of a supervisor to its verifier actor: JSON frames after a 4-byte big-endian length."""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any


class Wire:
    """Frames in and out of a non-blocking socket that `poll` watches."""

    def __init__(self, actor: socket.socket, poll: select.epoll) -> None:
        self.actor, self.poll = actor, poll
        self.incoming, self.outgoing = bytearray(), bytearray()
        actor.setblocking(False)
        poll.register(actor, select.EPOLLIN)

    def fileno(self) -> int:
        return self.actor.fileno()

    def read(self) -> list[dict[str, Any]] | None:
        """The requests that have come in whole; None: the actor is gone."""
        try:
            data = self.actor.recv(1 << 18)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        if not data:
            return None
        self.incoming += data
        requests = []
        while len(self.incoming) >= 4:
            (size,) = struct.unpack_from(">I", self.incoming)
            if len(self.incoming) < 4 + size:
                break
            requests.append(json.loads(self.incoming[4 : 4 + size]))
            del self.incoming[: 4 + size]
        return requests

    def respond(self, response: dict[str, Any]) -> None:
        """Queue one response."""
        body = json.dumps(response, separators=(",", ":")).encode()
        self.outgoing += struct.pack(">I", len(body)) + body

    def flush(self) -> None:
        """Send what the socket takes; the rest when it can be written again."""
        if not self.outgoing:
            return
        try:
            sent = self.actor.send(self.outgoing)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return  # The next read finds the actor gone.
        del self.outgoing[:sent]
        interest = select.EPOLLIN | (select.EPOLLOUT if self.outgoing else 0)
        self.poll.modify(self.actor, interest)
