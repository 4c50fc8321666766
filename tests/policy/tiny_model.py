"""A tiny random Qwen2 with a byte-level tokenizer, built in a second, for tests of the engines."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

BOUNDARIES = ["<code>", "<end_of_step>", "<end_of_code>"]
EOS = "<eos>"


def build_tokenizer(single_boundaries: bool) -> PreTrainedTokenizerFast:
    """256 byte tokens and an end token; boundaries as one token each, or spelt in bytes.

    Where they are spelt in bytes there is also a merged token `p>` + line break, which completes a
    boundary and carries white space past it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    if not single_boundaries:
        vocabulary[">\u010a"] = len(vocabulary)
        merges.append((">", "\u010a"))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if single_boundaries:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in BOUNDARIES])
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def build_model(
    directory: Path, seed: int, *, classifier: bool = False, single_boundaries: bool = True, layers: int = 2
) -> str:
    """Write a random checkpoint (hidden 128, head size 32) and its tokenizer; return the path."""
    tokenizer = build_tokenizer(single_boundaries)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=not classifier,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    torch.manual_seed(seed)
    model = (Qwen2ForSequenceClassification if classifier else Qwen2ForCausalLM)(config)
    model.to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
