"""Step pairs packed so that what they share is encoded once.

The sequences of a tree (prefix + continuation, as token ids) form a trie: sorted, each shares a first part
with the one before. A trie is laid out as one run of tokens in which each sequence appends only what is new;
attention then follows a sequence's own path (`attends`) and positions count along it. This gives every token
the same hidden state as its sequence alone would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evolve.learn.packing import MicroBatch, Ragged, aligned, joined


@dataclass(frozen=True, slots=True)
class Trie:
    """Sequences that share first parts: n distinct tokens."""

    ids: np.ndarray
    positions: np.ndarray
    attends: np.ndarray
    """n × n booleans: which tokens are on each token's path, itself included."""
    paths: list[np.ndarray]
    """For each sequence, in the order given, the indices of its tokens."""


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two sequences share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def trie_size(sequences: Sequence[np.ndarray]) -> int:
    """Distinct tokens of the sequences' trie."""
    ordered = [sequences[i] for i in _order(sequences)]
    shared = sum(shared_length(a, b) for a, b in pairwise(ordered))
    return sum(len(s) for s in ordered) - shared


def build_trie(sequences: Sequence[np.ndarray]) -> Trie:
    """The trie of sequences of token ids."""
    size = trie_size(sequences)
    ids = np.zeros(size, dtype=np.int64)
    positions = np.zeros(size, dtype=np.int64)
    attends = np.zeros((size, size), dtype=bool)
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sequences)
    previous, path, used = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    for i in _order(sequences):
        sequence = sequences[i]
        shared = shared_length(previous, sequence)
        new = np.arange(used, used + len(sequence) - shared)
        ids[new] = sequence[shared:]
        positions[new] = np.arange(shared, len(sequence))
        attends[new[:, None], path[None, :shared]] = True
        attends[new[:, None], new[None, :]] = np.tri(len(new), dtype=bool)
        previous, path, used = sequence, np.concatenate([path[:shared], new]), used + len(new)
        paths[i] = path
    return Trie(ids, positions, attends, paths)


def _order(sequences: Sequence[np.ndarray]) -> list[int]:
    """Lexicographic by token ids (big-endian bytes sort as the numbers do)."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())


# --------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Tries in rows, R × L, and the pairs to compare in them.

    C continuations are scored, those of pair p being 2p (`positive[p]`, preferred) and 2p + 1 (`negative[p]`), with
    `weights[p]`. For the `logprob` form, a token k of continuation `owner[k]` is `targets[k]`, predicted at (`rows[k]`,
    `columns[k]`), and `reference[k]` is its log-probability before training. For the `head` form, continuation c ends
    at (`end_rows[c]`, `end_columns[c]`).
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attends: np.ndarray
    """R × 1 × L × L booleans; padding attends to itself."""
    rows: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    owner: np.ndarray
    end_rows: np.ndarray
    end_columns: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    weights: np.ndarray
    reference: np.ndarray


class Pairs:
    """Step pairs as PPM items: the pairs of one tree's nodes, as many together as it pays to encode together.

    Pairs with a side longer than `max_length` are dropped and counted, never cut; the weights are normalised
    again after it. `break_even`: the row length at which attention costs as much as everything else, tokens;
    sharing is worth a longer row only below it. An item holds at most `batch` pairs and, but for a single
    pair that is larger, `budget` tokens.
    """

    def __init__(self, table: pa.Table, *, max_length: int, break_even: float, budget: int, batch: int) -> None:
        self._ids = {name: Ragged(table.column(f"{name}_ids")) for name in ("prefix", "positive", "negative")}
        self._sampled = {s: Ragged(table.column(f"{s}_sampled")) for s in ("positive", "negative")}
        prefix, positive, negative = (self._ids[n].lengths() for n in ("prefix", "positive", "negative"))
        fits = prefix + np.maximum(positive, negative) <= max_length
        scored = np.array([all(self._sampled[s][i].any() for s in self._sampled) for i in range(len(fits))], dtype=bool)
        self.overlong = int((~fits).sum())
        """Pairs dropped for their length."""
        self.unsupervised = int((fits & ~scored).sum())
        """Pairs dropped because one side has no sampled token."""
        usable = np.flatnonzero(fits & scored & (prefix > 0))
        self.pairs = len(usable)

        trees, weights = _grouped(table, usable)
        self._weight = weights
        self._items: list[list[int]] = []
        for nodes in trees:
            self._items += self._merge(nodes, break_even, budget, batch)
        self.lengths = np.array([trie_size(self._sequences(i)) for i in self._items], dtype=np.int64)
        self.sizes = np.array([len(i) for i in self._items], dtype=np.int64)
        self.weights = np.array([sum(self._weight[p] for p in i) for i in self._items], dtype=np.float64)
        """Summed weights of each item's pairs: what its share of a step's loss is normalised by."""
        scored_tokens = [
            sum(int(np.count_nonzero(self._sampled[side][pair])) for pair in item for side in ("positive", "negative"))
            for item in self._items
        ]
        self.offsets = np.concatenate([[0], np.cumsum(scored_tokens)]).astype(np.int64)
        """Item i's scored tokens are `reference[offsets[i] : offsets[i + 1]]`."""
        self.reference = np.zeros(int(self.offsets[-1]), dtype=np.float32)
        """Log-probability of every scored token before training; zeros until somebody measures it."""

    def ends_with(self, token: int) -> bool:
        """Whether any continuation's last token is `token`."""
        return any(
            len(ids := self._ids[side][pair]) and ids[-1] == token
            for item in self._items
            for pair in item
            for side in ("positive", "negative")
        )

    def _merge(self, nodes: list[list[int]], break_even: float, budget: int, batch: int) -> list[list[int]]:
        """Greedily join a tree's neighbouring nodes while that lowers the cost L + L²/break_even."""

        def cost(length: int) -> float:
            return length + length * length / break_even

        units: list[list[int]] = []
        for node in nodes:
            units += self._split(node, budget, batch)
        items: list[list[int]] = []
        size = 0
        for unit in units:
            own = trie_size(self._sequences(unit))
            if items and len(items[-1]) + len(unit) <= batch:
                together = trie_size(self._sequences(items[-1] + unit))
                if together <= budget and cost(together) <= cost(size) + cost(own):
                    items[-1] += unit
                    size = together
                    continue
            items.append(list(unit))
            size = own
        return items

    def _split(self, node: list[int], budget: int, batch: int) -> list[list[int]]:
        """A node's pairs in parts within the budget; a single pair may exceed it."""
        parts: list[list[int]] = [[]]
        for pair in node:
            grown = [*parts[-1], pair]
            if parts[-1] and (len(grown) > batch or trie_size(self._sequences(grown)) > budget):
                parts.append([pair])
            else:
                parts[-1] = grown
        return parts

    def _sequences(self, pairs: Sequence[int]) -> list[np.ndarray]:
        """Both sides of each pair after its prefix: positive, negative, positive, …"""
        return [
            np.concatenate([self._ids["prefix"][pair], self._ids[side][pair]])
            for pair in pairs
            for side in ("positive", "negative")
        ]

    def collate(self, rows: MicroBatch, pad_id: int) -> PairBatch:
        """The arrays of one micro-batch; with no rows, a row of padding that compares nothing."""
        length = aligned(max((sum(int(self.lengths[i]) for i in row) for row in rows), default=1))
        ids = np.full((max(1, len(rows)), length), pad_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        attends = np.tile(np.eye(length, dtype=bool), (len(ids), 1, 1, 1))
        tokens: list[tuple[np.ndarray, ...]] = []
        ends: list[tuple[int, int]] = []
        weights: list[float] = []
        reference: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
        for r, row in enumerate(rows):
            start = 0
            for item in row:
                reference.append(self.reference[self.offsets[item] : self.offsets[item + 1]])
                trie = build_trie(self._sequences(self._items[item]))
                end = start + len(trie.ids)
                ids[r, start:end] = trie.ids
                positions[r, start:end] = trie.positions
                attends[r, 0, start:end, start:end] = trie.attends
                paths = iter(trie.paths)
                for pair in self._items[item]:
                    for side in ("positive", "negative"):
                        path = next(paths) + start
                        predicted = np.flatnonzero(self._sampled[side][pair]) + len(self._ids["prefix"][pair])
                        tokens.append(
                            (
                                np.full(len(predicted), r),
                                path[predicted - 1],
                                ids[r, path[predicted]],
                                np.full(len(predicted), len(ends)),
                            )
                        )
                        ends.append((r, int(path[-1])))
                    weights.append(self._weight[pair])
                start = end
        at_row, at_column, targets, owner = (joined([t[i] for t in tokens]) for i in range(4))
        end_rows, end_columns = (np.array([e[i] for e in ends], dtype=np.int64) for i in range(2))
        positive = np.arange(0, len(ends), 2)
        return PairBatch(
            ids, positions, attends, at_row, at_column, targets, owner, end_rows, end_columns,
            positive, positive + 1, np.array(weights, dtype=np.float32), np.concatenate(reference),
        )  # fmt: skip


def _grouped(table: pa.Table, usable: np.ndarray) -> tuple[Iterator[list[list[int]]], np.ndarray]:
    """The usable pairs by tree and, within a tree, by node; and the weight of every row, by which a node's sum to 1."""
    columns = np.stack([_codes(table.column(name))[usable] for name in _NODE_KEY])
    order = np.lexsort(columns[::-1])
    pairs, columns = usable[order], columns[:, order]
    differs = columns[:, 1:] != columns[:, :-1]
    bounds = [0, *(np.flatnonzero(differs.any(axis=0)) + 1).tolist(), len(pairs)]
    new_tree = set((np.flatnonzero(differs[:3].any(axis=0)) + 1).tolist())
    weights = np.zeros(table.num_rows)
    spans = list(pairwise(bounds)) if len(pairs) else []
    for start, end in spans:
        weights[pairs[start:end]] = 1.0 / (end - start)

    def trees() -> Iterator[list[list[int]]]:
        nodes: list[list[int]] = []
        for start, end in spans:
            if start in new_tree:
                yield nodes
                nodes = []
            nodes.append(pairs[start:end].tolist())
        if nodes:
            yield nodes

    return trees(), weights


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Integers in the order of the column's values, equal for equal ones."""
    if not pa.types.is_string(column.type):
        return column.to_numpy().astype(np.int64)
    encoded = column.combine_chunks().dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.array_sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]


_NODE_KEY = ("problem_id", "round", "tree", "kind", "node")
"""What the pairs of a node have in common; the first three, what those of a tree have."""
