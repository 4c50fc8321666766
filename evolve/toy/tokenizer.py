"""The tiny world's tokenizer: a byte-level BPE, trained here on the world's own texts.

It is a `Qwen2Tokenizer`, since `AutoTokenizer` gives every Qwen2 checkpoint that class and with it
Qwen2's pre-tokenisation and NFC normalisation, whatever its tokenizer.json says; a tokenizer of
another kind would train the model on other tokens than engines later feed it. All 256 bytes are
tokens, so every text in normal form C round-trips.

Digits are single tokens, with and without a leading space, so that copying a number is copying
tokens; those with a space, and the markers of the step format, are ordinary (not special) added
tokens: detokenisation keeps them, and engines see the markers as stop strings.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from evolve.toy.forms import EVENTS
from evolve.toy.world import CODE, END_OF_CODE, END_OF_STEP, solution, specs

PAD = "<pad>"
END_OF_TEXT = "<end_of_text>"
VOCABULARY = 640
"""Upper bound on the BPE's tokens; training ends below it, when every word is one token."""

_ADDED = (CODE, END_OF_STEP, END_OF_CODE, *(f" {digit}" for digit in range(10)))


@cache
def train() -> Qwen2Tokenizer:
    """The tokenizer. It depends on nothing but this package: every call gives the same one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(
        (_without_added(text) for text in _texts()),
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False),
    )
    learned = json.loads(bpe.to_str())["model"]
    options: dict[str, Any] = {
        "merges": [tuple(merge) for merge in learned["merges"]],
        "unk_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
    }
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], **options)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in _ADDED])
    return tokenizer


def _texts() -> list[str]:
    drawn = specs(1500, 0, "demo", [1, 2, 3, 4, 5, 6], len(EVENTS))
    return [text for spec in drawn for text in (f"{spec.question}\n", *solution(spec))]


def _without_added(text: str) -> str:
    """The text as the BPE will see it: added tokens are cut out before it."""
    for added in _ADDED:
        text = text.replace(added, "\n")
    return text
