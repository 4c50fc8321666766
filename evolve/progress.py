"""The live progress line: one line that is rewritten on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

LOG_EVERY_S = 10.0


class ProgressLine:
    """Shows the newest state of what is under way."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = 0.0
        self._width = 0

    def show(self, text: str, force: bool = False) -> None:
        """Replace the line (terminal), or print it unless one was printed within ten seconds (log)."""
        now = time.monotonic()
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)
        elif force or now - self._shown >= LOG_EVERY_S:
            self._stream.write(text + "\n")
            self._stream.flush()
        else:
            return
        self._shown = now

    def end(self, text: str) -> None:
        """Leave a last line standing."""
        self.show(text, force=True)
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m05s, 2h07m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
