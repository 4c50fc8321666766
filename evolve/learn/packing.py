"""From token sequences of many lengths to the rectangular batches a worker trains on.

An *item* is what may not be torn apart: one trajectory (SFT), or the pairs of a node or more (PPM). Items are
grouped into optimiser steps, dealt to workers, and laid out in *micro-batches*: rows of equal length, each
holding one item or more. Rows are as short as the longest item in them allows, because attention without a
variable-length kernel costs the square of the row's length.

All of it is a function of lengths and a seed, so that every worker computes the same plan by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from evolve.learn.errors import LearningError

IGNORED = -100
"""Label of a token that is not trained on."""
_ALIGN = 8

MicroBatch = list[list[int]]
"""Rows of item indices; no rows: a worker that only takes part in the communication."""


class Ragged:
    """A list column of an Arrow table, read as numpy arrays without copying; booleans are unpacked when asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [c for c in column.chunks if len(c)]
        packed = pa.types.is_boolean(column.type.value_type)
        self._values = [c.values if packed else c.values.to_numpy() for c in self._chunks]
        self._offsets = [c.offsets.to_numpy() for c in self._chunks]
        self._starts = np.cumsum([0, *(len(c) for c in self._chunks)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        chunk = bisect_right(self._starts, index) - 1
        offsets, at = self._offsets[chunk], index - self._starts[chunk]
        values = self._values[chunk][offsets[at] : offsets[at + 1]]
        return values if isinstance(values, np.ndarray) else values.to_numpy(zero_copy_only=False)

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(o) for o in self._offsets] or [np.zeros(0, np.int64)])


# --------------------------------------------------------------------------- the plan


def plan_steps(sizes: np.ndarray, batch: int, epochs: float, seed: int) -> list[np.ndarray]:
    """Item indices of every optimiser step of a training.

    `sizes[i]` is what item i counts towards `batch` (1 for a trajectory; its pairs for PPM). Each epoch is
    shuffled anew and cut so that a step holds at most `batch` (or a single item that is larger). A fractional
    last epoch is cut short.
    """
    if not len(sizes):
        raise LearningError("there is nothing to train on: no rows are left after filtering")
    random = np.random.default_rng(seed)
    steps: list[np.ndarray] = []
    whole = int(np.ceil(epochs))
    for epoch in range(whole):
        order = random.permutation(len(sizes))
        cuts, held = [], 0
        for position, item in enumerate(order):
            if held and held + sizes[item] > batch:
                cuts.append(position)
                held = 0
            held += int(sizes[item])
        epoch_steps = np.split(order, cuts)
        if epoch == whole - 1 and epochs < whole:
            epoch_steps = epoch_steps[: max(1, round(len(epoch_steps) * (epochs - epoch)))]
        steps += epoch_steps
    return steps


def deal(items: Sequence[int], lengths: np.ndarray, workers: int) -> list[list[int]]:
    """Items for each worker, the longest dealt first, each to the worker with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for item in sorted(items, key=lambda i: (-lengths[i], i)):
        lightest = load.index(min(load))
        shares[lightest].append(int(item))
        load[lightest] += int(lengths[item])
    return shares


def lay_out(items: Sequence[int], lengths: np.ndarray, budget: int) -> list[MicroBatch]:
    """Micro-batches of at most `budget` tokens (padding included) for one worker's items.

    First fit by falling length: a micro-batch's rows are as long as its first, longest item. An item longer
    than the budget gets a micro-batch of its own.
    """
    waiting = sorted(items, key=lambda i: (-lengths[i], i))
    batches: list[MicroBatch] = []
    while waiting:
        row_length = int(lengths[waiting[0]])
        capacity = max(1, budget // aligned(row_length))
        rows: MicroBatch = []
        room: list[int] = []
        left: list[int] = []
        for item in waiting:
            length = int(lengths[item])
            fit = next((r for r, free in enumerate(room) if free >= length), None)
            if fit is not None:
                rows[fit].append(item)
                room[fit] -= length
            elif len(rows) < capacity:
                rows.append([item])
                room.append(row_length - length)
            else:
                left.append(item)
        batches.append(rows)
        waiting = left
    return batches


def worker_batches(items: Sequence[int], lengths: np.ndarray, budget: int, workers: int, rank: int) -> list[MicroBatch]:
    """This worker's micro-batches of one optimiser step.

    All workers get equally many (some may be empty), since their communication is collective.
    """
    layouts = [lay_out(share, lengths, budget) for share in deal(items, lengths, workers)]
    most = max(len(layout) for layout in layouts)
    return layouts[rank] + [[]] * (most - len(layouts[rank]))


# --------------------------------------------------------------------------- SFT


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of packed sequences, R × L, and the K supervised tokens in them.

    The logits at (`rows[k]`, `columns[k]`) predict `targets[k]`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    """Restarts at 0 in every sequence and in the padding: a boundary that attention does not cross."""
    rows: np.ndarray
    columns: np.ndarray
    targets: np.ndarray


class Completions:
    """Trajectories as SFT items: prompt and completion, supervised on the sampled tokens only.

    Sequences longer than `max_length` are dropped and counted, never cut; so are those with nothing to
    supervise.
    """

    def __init__(self, table: pa.Table, max_length: int) -> None:
        self._prompts = Ragged(table.column("prompt_ids"))
        self._completions = Ragged(table.column("token_ids"))
        self._sampled = Ragged(table.column("sampled"))
        lengths = self._prompts.lengths() + self._completions.lengths()
        supervised = np.array([self._targets(i).size for i in range(len(lengths))], dtype=np.int64)
        usable = (lengths <= max_length) & (supervised > 0)
        self._index = np.flatnonzero(usable)
        self.overlong = int((lengths > max_length).sum())
        """Sequences dropped for their length."""
        self.unsupervised = int(((lengths <= max_length) & (supervised == 0)).sum())
        """Sequences dropped because no token of theirs was sampled after the first."""
        self.lengths = lengths[usable]
        self.weights = supervised[usable].astype(np.float64)
        """Supervised tokens of each item: what its share of a step's loss is normalised by."""
        self.sizes = np.ones(len(self._index), dtype=np.int64)

    def _targets(self, row: int) -> np.ndarray:
        """Positions in prompt + completion that are predicted: sampled, and not the very first token."""
        positions = np.flatnonzero(self._sampled[row]) + len(self._prompts[row])
        return positions[positions > 0]

    def collate(self, rows: MicroBatch, pad_id: int) -> TokenBatch:
        """The arrays of one micro-batch; with no rows, a row of padding that supervises nothing."""
        length = aligned(max((sum(int(self.lengths[i]) for i in row) for row in rows), default=1))
        ids = np.full((max(1, len(rows)), length), pad_id, dtype=np.int64)
        positions = np.tile(np.arange(length), (len(ids), 1))
        at_row, at_column, targets = [], [], []
        for r, row in enumerate(rows):
            start = 0
            for item in row:
                source = int(self._index[item])
                sequence = np.concatenate([self._prompts[source], self._completions[source]])
                end = start + len(sequence)
                ids[r, start:end] = sequence
                positions[r, start:end] = np.arange(len(sequence))
                predicted = self._targets(source)
                at_row.append(np.full(len(predicted), r))
                at_column.append(start + predicted - 1)
                targets.append(sequence[predicted])
                start = end
            positions[r, start:] = np.arange(length - start)
        return TokenBatch(ids, positions, joined(at_row), joined(at_column), joined(targets))

    def labels(self, batch: TokenBatch) -> np.ndarray:
        """The batch's supervision in the usual form: R × L, `IGNORED` where a token is not predicted."""
        labels = np.full(batch.input_ids.shape, IGNORED, dtype=np.int64)
        labels[batch.rows, batch.columns + 1] = batch.targets
        return labels


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Index arrays, one after the other, as int64."""
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def aligned(length: int) -> int:
    """A row length that vector units like."""
    return -(-length // _ALIGN) * _ALIGN
