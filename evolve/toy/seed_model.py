"""The seed policy: a Qwen2 of 0.7 M parameters, pre-trained here in about a minute on two cores.

It learns from demonstrations that hold misconceptions (see `evolve.toy.forms`) and from a
*quoting* task without solutions (problem -> its sentences), because copying names and numbers is
what so small a model otherwise fails at. The loss is on completions only.

Hidden matrices are trained with Muon, which reached a lower loss than AdamW at equal tokens; the
embedding (tied to the output) and the vectors with AdamW.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from evolve.schema import ToyConfig
from evolve.toy import tokenizer as toy_tokenizer
from evolve.toy.forms import EVENTS
from evolve.toy.world import demonstrated, prompt, quoting, specs

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""

MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 5e-3
WARMUP_STEPS = 30
LINE_TOKENS = 256
"""Rows are packed into lines of this many tokens: short lines keep attention cheap. (Batches of
rows of similar length, which need no packing, learned more slowly.)"""
EMBEDDING_STD = 0.1
"""Standard deviation of the initial embeddings; the usual 0.02 learns to copy later."""


def demonstration_rows(
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    difficulties: Sequence[int],
    operations: int,
) -> list[Row]:
    """Problems with their demonstrated, partly wrong solutions."""
    rng = random.Random(f"toy demonstrations {seed}")
    return [
        (_encode(tokenizer, prompt(spec.question)), _encode(tokenizer, "".join(demonstrated(spec, rng))))
        for spec in specs(count, seed, "demo", difficulties, operations)
    ]


def replay_rows(
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    difficulties: Sequence[int] = (1, 2, 3, 4, 5, 6),
    operations: int = len(EVENTS),
) -> list[Row]:
    """The quoting task: prompt ids and completion ids of `count` texts.

    Mixed into SFT it keeps the policy from forgetting how to copy. The texts are of the `demo`
    split, so they are no training or held-out problems.
    """
    end = [tokenizer.eos_token_id]
    return [
        (_encode(tokenizer, question), _encode(tokenizer, quotes) + end)
        for question, quotes in map(quoting, specs(count, seed, "demo", difficulties, operations))
    ]


def build(
    config: ToyConfig,
    seed: int,
    output: Path,
    threads: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Pre-train the seed model and publish it at `output` as a Hugging Face directory (fp32).

    `progress(step, steps, loss)` is called after every step. The directory is written aside and
    renamed, so `output` is complete or absent. Returns final loss (mean of the last 50 steps,
    nats per token), tokens seen, parameters and seconds. Raises `FileExistsError` when `output`
    exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it, or choose another place for the seed model")
    began = time.monotonic()
    tokenizer = toy_tokenizer.train()
    rows = demonstration_rows(config.demonstrations, seed, tokenizer, config.difficulties, config.operations)
    rows += replay_rows(config.quoting_texts, seed + 1_000_003, tokenizer, config.difficulties, config.operations)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _new_model(config, tokenizer)
            losses, tokens = _train(model, rows, config, seed, tokenizer.pad_token_id, progress)
    finally:
        torch.set_num_threads(threads_before)
    _publish(model, tokenizer, output)
    last = losses[-50:]
    return {
        "loss": sum(last) / len(last),
        "tokens": float(tokens),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "seconds": time.monotonic() - began,
    }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _new_model(config: ToyConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A fresh model; heads are 32 wide, the narrowest that vLLM's CPU build takes."""
    heads = config.hidden_size // 32
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=EMBEDDING_STD)
    return model


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


def _train(
    model: Qwen2ForCausalLM,
    rows: Sequence[Row],
    config: ToyConfig,
    seed: int,
    pad: int,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[list[float], int]:
    """Minimise the completions' loss; return every step's loss and the number of tokens seen."""
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
    for step in range(steps):
        batch = next(batches)
        loss = _loss(model, batch, pad)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seen += sum(len(row[0]) + len(row[1]) for line in batch for row in line)
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    model.eval()
    return losses, seen


def _loss(model: Qwen2ForCausalLM, lines: Sequence[Sequence[Row]], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens, nats.

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
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])


def _publish(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write beside, flush to disk, rename."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
