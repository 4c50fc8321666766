"""What is remembered of the past, as far as it fits: least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")

ENTRY_BYTES = 512
"""What an entry takes beside its text, generously: key, objects, its place in the dictionary."""


class Remembered(Generic[V]):
    """Values by key, of which together they take about `budget` bytes at most."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """The value of a key, now the most recently used; None: it is not known, or no more."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, value: V, characters: int = 0) -> None:
        """Remember a value, in which there are texts of so many characters."""
        _, before = self._entries.pop(key, (None, 0))
        size = ENTRY_BYTES + 4 * characters
        self._entries[key] = (value, size)
        self.bytes += size - before
        while self.bytes > self.budget and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
