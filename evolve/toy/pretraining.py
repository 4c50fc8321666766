"""Pre-training of the seed policy: packed lines, a completion-only loss, Muon and AdamW, on one or more processes.

Hidden matrices are trained with Muon, which reached a lower loss than AdamW at equal tokens; the embedding (tied to the
output) and the vectors with AdamW.

Several processes share every batch: each takes its lines, the gradients are added up, and all take the same step. One
process with several threads is as fast on an idle machine, but threads that wait for each other at every operation
come to a near standstill where something else uses a core.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore
from torch.distributed import ProcessGroupGloo
from transformers import Qwen2ForCausalLM

from evolve.schema import ToyConfig

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""

MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 5e-3
WARMUP_STEPS = 30
LINE_TOKENS = 256
"""Rows are packed into lines of this many tokens: short lines keep attention cheap. (Batches of
rows of similar length, which need no packing, learned more slowly.)"""
PEER_TIMEOUT = timedelta(minutes=5)
"""How long a process waits for another one's gradients."""


class Share:
    """One process's part of every batch, and how its gradients meet the others'."""

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        """`meeting`: a file that does not exist yet, by which the `size` processes find each other."""
        self.rank, self.size = rank, size
        self._group: Any = None
        if size > 1:
            self._group = ProcessGroupGloo(FileStore(meeting, size), rank, size, PEER_TIMEOUT)

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up tensors over all processes, in place, in one message."""
        if self._group is None:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._group.allreduce([flat]).wait()
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def helpers(count: int, work: Callable[[Share], Any]) -> Iterator[Share]:
    """This process's share beside `count` others that each call `work` with theirs, ended with the block.

    `work` is pickled for them.
    """
    with tempfile.TemporaryDirectory() as directory:
        meeting = str(Path(directory) / "meeting")
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(target=_help, args=(work, rank, count + 1, meeting), daemon=True)
            for rank in range(1, count + 1)
        ]
        for other in others:
            other.start()
        try:
            yield Share(0, count + 1, meeting)
        finally:
            for other in others:
                other.terminate()
                other.join()


def _help(work: Callable[[Share], Any], rank: int, size: int, meeting: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    work(Share(rank, size, meeting))


def _packed(rows: Sequence[Row], rng: random.Random) -> list[list[Row]]:
    """All rows in random order, several to a line of at most `LINE_TOKENS` tokens (first fit)."""
    order = list(rows)
    rng.shuffle(order)
    lines: list[list[Row]] = []
    room: list[int] = []
    first_open = 0
    for row in order:
        length = len(row[0]) + len(row[1])
        first_open = max(first_open, len(lines) - 16)
        fitting = (i for i in range(first_open, len(lines)) if room[i] >= length)
        index = next(fitting, len(lines))
        if index == len(lines):
            lines.append([])
            room.append(LINE_TOKENS)
        lines[index].append(row)
        room[index] -= length
    rng.shuffle(lines)
    return lines


def _batches(rows: Sequence[Row], tokens: int, rng: random.Random) -> Iterator[list[list[Row]]]:
    """Endless batches of packed lines, `tokens` in all (at least one line)."""
    size = max(1, tokens // LINE_TOKENS)
    while True:
        lines = _packed(rows, rng)
        for start in range(0, len(lines) - size + 1, size):
            yield lines[start : start + size]


def pretrain(
    model: Qwen2ForCausalLM,
    rows: Sequence[Row],
    config: ToyConfig,
    seed: int,
    pad: int,
    share: Share,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[list[float], int]:
    """Minimise the completions' loss; return every step's loss and the number of tokens seen.

    Every process of `share` makes the same call.
    """
    hidden = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=MUON_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    steps = config.pretrain_steps
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - min(steps - 1, WARMUP_STEPS)))
        )
        for o in optimizers
    ]
    batches = _batches(rows, config.tokens_per_step, random.Random(f"toy batches {seed}"))
    losses: list[float] = []
    seen = 0
    model.train()
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    for step, batch in enumerate(islice(batches, steps)):
        supervised = sum(len(row[1]) for line in batch for row in line)
        loss = _summed_loss(model, batch[share.rank :: share.size], pad) / supervised
        loss.backward()
        loss = loss.detach().reshape(1)
        share.sum([loss, *gradients])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
        seen += sum(len(row[0]) + len(row[1]) for line in batch for row in line)
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    model.eval()
    return losses, seen


def _summed_loss(model: Qwen2ForCausalLM, lines: Sequence[Sequence[Row]], pad: int) -> torch.Tensor:
    """Summed cross-entropy of the completions' tokens, nats.

    Rows of one line do not see each other: a token attends to earlier tokens with the same number.
    Positions need not restart, since rotary embeddings only know distances.
    """
    ids = torch.full((len(lines), LINE_TOKENS), pad)
    number = torch.full((len(lines), LINE_TOKENS), -1)
    learned = torch.zeros((len(lines), LINE_TOKENS), dtype=torch.bool)
    for i, line in enumerate(lines):
        at = 0
        for j, (question, completion) in enumerate(line):
            middle, end = at + len(question), at + len(question) + len(completion)
            ids[i, at:end] = torch.tensor([*question, *completion])
            number[i, at:end] = j
            learned[i, middle:end] = True
            at = end
    mask = (number[:, None, :, None] == number[:, None, None, :]).tril()
    states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(states[:, :-1][learned[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned[:, 1:]], reduction="sum")
