"""The live snapshots of a supervisor: bounded by memory and number, the least recently used evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from evolve.verify.nodes import Node, private_bytes


class Snapshots:
    """Stopped nodes by the key of their state."""

    def __init__(self, budget: int, most: int) -> None:
        """`budget`: bytes that they may keep to themselves, together; `most`: how many there may be."""
        self.budget, self.most = budget, most
        self.nodes: OrderedDict[str, Node] = OrderedDict()
        self.memory = 0

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self.nodes.values()))

    def deepest(self, keys: Sequence[str]) -> tuple[Node | None, int]:
        """The snapshot of the last of `keys` that has one, now the most recently used; and how many keys it covers."""
        for index in range(len(keys) - 1, -1, -1):
            node = self.nodes.get(keys[index])
            if node is not None:
                self.nodes.move_to_end(node.key)
                return node, index + 1
        return None, 0

    def add(self, node: Node) -> None:
        """Keep a node."""
        node.memory = private_bytes(node.pid)
        self.memory += node.memory
        self.nodes[node.key] = node

    def surplus(self) -> Iterator[Node]:
        """What must go while the budget is exceeded; never the newest, nor one that is being forked."""
        if not self._too_much():  # as after nearly every step
            return
        for candidate in list(self.nodes.values())[:-1]:
            if not self._too_much():
                return
            if candidate.forking == 0:
                yield candidate

    def _too_much(self) -> bool:
        return self.memory > self.budget or len(self.nodes) > self.most

    def discard(self, node: Node) -> None:
        """Forget a node, if it is kept."""
        if self.nodes.get(node.key) is node:
            del self.nodes[node.key]
            self.memory -= node.memory
            node.memory = 0
