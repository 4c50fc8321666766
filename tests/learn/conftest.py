"""A tiny random Qwen2 with a byte tokenizer, and rows to train it on."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from evolve.types import StepPair, Trajectory

VOCABULARY = 96


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: two layers, head size 32, fp32, tied embeddings."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def save_tiny_model(path: Path, vocabulary: int = VOCABULARY, layers: int = 2, hidden: int = 64) -> Path:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        intermediate_size=3 * hidden,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


def make_trajectories(count: int, seed: int = 0, vocabulary: int = VOCABULARY, length: int = 12) -> list[Trajectory]:
    """Prompts of random tokens; the completion repeats the prompt, with one token the environment inserted."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt = tuple(draw.randrange(2, vocabulary) for _ in range(draw.randrange(length // 2, length)))
        completion = (*prompt, 3, 1)
        rows.append(
            Trajectory(
                problem_id=f"p{i}", round=1, tree=0, node=4, correct=True, q=draw.random(),
                prompt_ids=prompt, token_ids=completion,
                sampled=tuple(t != 3 or at < len(prompt) for at, t in enumerate(completion)),
                text="", answer="", logprob=0.0,
            )
        )  # fmt: skip
    return rows


def make_pairs(
    problems: int, nodes: int = 3, seed: int = 0, vocabulary: int = VOCABULARY, prompt: int = 10, step: int = 5
) -> list[StepPair]:
    """Trees whose better steps copy the prompt's tokens and whose worse ones do not; 2 × 2 pairs a node."""
    draw = random.Random(seed)
    rows = []
    for p in range(problems):
        prefix = tuple(draw.randrange(2, vocabulary) for _ in range(prompt))
        for node in range(nodes):
            good = [(*prefix[: step - 1], 2 + k) for k in range(2)]
            bad = [(*(draw.randrange(2, vocabulary) for _ in range(step)), 2 + k) for k in range(2)]
            for g in good:
                for b in bad:
                    rows.append(
                        StepPair(
                            problem_id=f"p{p}", round=1, tree=0, node=node, kind="step", prefix_ids=prefix,
                            positive_ids=g, negative_ids=b, positive_sampled=(True,) * len(g),
                            negative_sampled=(True,) * len(b), positive_q=0.5, negative_q=-1.0, weight=0.25,
                        )
                    )  # fmt: skip
            prefix += good[0]
    return rows


@pytest.fixture
def trajectories() -> Callable[..., list[Trajectory]]:
    return make_trajectories


@pytest.fixture
def step_pairs() -> Callable[..., list[StepPair]]:
    return make_pairs
