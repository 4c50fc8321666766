"""The live snapshots of a supervisor: bounded by memory and number, the least recently used evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from evolve.verify.deaths import Death
from evolve.verify.nodes import Node, private_bytes

FALLEN = 1 << 12
"""States remembered that their own code has ended."""


class Snapshots:
    """Stopped nodes by the key of their state."""

    def __init__(self, budget: int, most: int) -> None:
        """`budget`: bytes that they may keep to themselves, together; `most`: how many there may be."""
        self.budget, self.most = budget, most
        self.nodes: OrderedDict[str, Node] = OrderedDict()
        self.memory = 0
        """Bytes of the kept ones, and of those ended whose pages live on in nodes forked from them."""
        self.fallen: OrderedDict[str, Death] = OrderedDict()
        """What states ended of that their own code has ended, by key."""

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
        """Forget a node that ends, kept or not; its memory counts until all forked from it have ended, too."""
        if self.nodes.get(node.key) is node:
            del self.nodes[node.key]
        node.ended = True
        released: Node | None = node
        while released is not None and released.ended and released.heirs == 0:
            self.memory -= released.memory
            released.memory = 0
            above, released.origin = released.origin, None
            if above is not None:
                above.heirs -= 1
            released = above

    def fell(self, key: str, death: Death) -> None:
        """A state has ended itself, if it was its code. Made again it would do so again, which is not tried for ever:
        what is not certain is believed the second time."""
        if death.status in ("crash", "refused"):
            self.fallen[key] = death._replace(certain=death.certain or key in self.fallen)
            if len(self.fallen) > FALLEN:
                self.fallen.popitem(last=False)

    def dead_end(self, keys: Sequence[str]) -> Death | None:
        """The verdict on a step that needs a state of these that is known not to last; None: they all may."""
        deaths = (self.fallen.get(key) for key in keys)
        return next((gone(death) for death in deaths if death is not None and death.certain), None)


def gone(death: Death) -> Death:
    """The verdict on a step whose state to continue from has ended so."""
    return death._replace(message=f"the state to continue from is gone: {death.message}")
