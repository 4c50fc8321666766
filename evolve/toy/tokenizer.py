"""The tiny world's tokenizer: a byte-level BPE, trained here on the world's own texts.

Digits are single tokens, with and without a leading space, so that copying a number is copying
tokens. Every Unicode text round-trips, since all 256 bytes are tokens. The markers of the step
format are ordinary (not special) added tokens: detokenisation keeps them, and engines see them as
stop strings.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from evolve.toy.forms import EVENTS
from evolve.toy.world import CODE, END_OF_CODE, END_OF_STEP, solution, specs

PAD = "<pad>"
END_OF_TEXT = "<end_of_text>"
VOCABULARY = 608
"""Upper bound on the number of tokens; training ends below it, when every word is one token."""

_PIECES = r"'s| ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s"
"""What merges may not cross: a digit, a word, a run of symbols, one white space character."""


@cache
def train() -> PreTrainedTokenizerFast:
    """The tokenizer. It depends on nothing but this package: every call gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        text.replace(END_OF_STEP, "").replace(END_OF_CODE, "")
        for spec in specs(1500, 0, "demo", [1, 2, 3, 4, 5, 6], len(EVENTS))
        for text in (spec.question, *solution(spec))
    ]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 5,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (CODE, END_OF_STEP, END_OF_CODE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
