"""The seed policy: a Qwen2 of 0.7 M parameters, pre-trained here in about a minute on two cores.

It learns from demonstrations that hold misconceptions (see `evolve.toy.forms`) and from a
*quoting* task without solutions (problem -> its sentences), because copying names and numbers is
what so small a model otherwise fails at. The loss is on completions only.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from evolve.disk import aside_of
from evolve.files import Place, is_published, publish_directory, storage_errors, workshop
from evolve.schema import ToyConfig
from evolve.toy import tokenizer as toy_tokenizer
from evolve.toy.forms import EVENTS
from evolve.toy.pretraining import Row, Share, helpers, pretrain
from evolve.toy.world import demonstrated, prompt, quoting, specs

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
    output: Place,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Pre-train the seed model and publish it at `output` as a Hugging Face directory (fp32).

    `config.workers` processes of one thread each share the work. `progress(step, steps, loss)` is called after
    every step. The directory is written aside and renamed, so `output` is complete or absent. Returns final loss
    (mean of the last 50 steps, nats per token), tokens seen, parameters and seconds. Raises `FileExistsError` when
    `output` exists.
    """
    if is_published(output):
        raise FileExistsError(f"{output} exists: remove it, or choose another place for the seed model")
    began = time.monotonic()
    with helpers(config.workers - 1, partial(_trained, config, seed)) as share:
        model, tokenizer, losses, tokens = _trained(config, seed, share, progress)
    _publish(model, tokenizer, output)
    last = losses[-50:]
    return {
        "loss": sum(last) / len(last),
        "tokens": float(tokens),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "seconds": time.monotonic() - began,
    }


def _trained(
    config: ToyConfig, seed: int, share: Share, progress: Callable[[int, int, float], None] | None = None
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase, list[float], int]:
    """The model, its tokenizer, every step's loss and the tokens seen; the same in every process of `share`."""
    tokenizer = toy_tokenizer.train()
    rows = demonstration_rows(config.demonstrations, seed, tokenizer, config.difficulties, config.operations)
    rows += replay_rows(config.quoting_texts, seed + 1_000_003, tokenizer, config.difficulties, config.operations)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _new_model(config, tokenizer)
            losses, tokens = pretrain(model, rows, config, seed, tokenizer.pad_token_id, share, progress)
    finally:
        torch.set_num_threads(threads_before)
    return model, tokenizer, losses, tokens


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


def _publish(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Place) -> None:
    """A Hugging Face directory that is there whole or not at all."""
    aside = aside_of(workshop(output))
    aside.parent.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # it would write over the caller's own line
    try:
        with storage_errors(output):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            publish_directory(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
