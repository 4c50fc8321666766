"""The tiny world's tokenizer and seed model, as other libraries load them."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolve.schema import ToyConfig
from evolve.toy.seed_model import build, replay_rows
from evolve.toy.tokenizer import train
from evolve.toy.world import CODE, END_OF_CODE, END_OF_STEP, prompt, solution, specs

TINY = ToyConfig(
    difficulties=[1], operations=4, demonstrations=40, quoting_texts=40, pretrain_steps=30, layers=2, workers=1
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("toy") / "seed"
    build(TINY, 0, output)
    return output


def test_digits_and_markers_are_single_tokens() -> None:
    tokenizer = train()
    for text in (*"0123456789", *(f" {d}" for d in range(10)), CODE, END_OF_STEP, END_OF_CODE):
        assert len(tokenizer.encode(text)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("tom = 120")) == ["tom", "Ġ=", " 1", "2", "0"]


def test_a_saved_tokenizer_loads_as_itself(checkpoint: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    for spec in specs(100, 0, "dev", [1, 3, 6], 12):
        text = prompt(spec.question) + "".join(solution(spec))
        assert loaded.encode(text) == train().encode(text)
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert loaded.pad_token_id is not None
    assert loaded.eos_token_id is not None
    assert loaded.pad_token_id != loaded.eos_token_id


def test_the_prompt_and_the_steps_tokenise_alike_apart_and_together() -> None:
    encode = train().encode
    for spec in specs(100, 1, "dev", [1, 3, 6], 12):
        parts = [prompt(spec.question), *solution(spec)]
        assert encode("".join(parts)) == [token for part in parts for token in encode(part)]


@given(st.text())
def test_every_text_in_normal_form_round_trips(text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert train().decode(train().encode(text)) == text


def test_the_longest_problems_fit_well_into_the_context() -> None:
    for spec in specs(300, 0, "train", [6], 12):
        assert len(train().encode(prompt(spec.question) + "".join(solution(spec)))) < 320


def test_replay_rows_are_problems_and_their_quotes() -> None:
    tokenizer = train()
    rows = replay_rows(5, 0, tokenizer, [2], 4)
    assert rows == replay_rows(5, 0, tokenizer, [2], 4)
    for question, quotes in rows:
        assert quotes[-1] == tokenizer.eos_token_id
        lines = tokenizer.decode(quotes[:-1]).splitlines()
        assert " ".join(line.removeprefix("# ") for line in lines) + "\n" == tokenizer.decode(question)


def test_a_built_model_loads_in_fp32_with_tied_embeddings_and_wide_enough_heads(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.config.vocab_size == len(train())
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_building_is_repeatable_and_leaves_the_global_random_state_alone(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    metrics = build(TINY, 0, tmp_path / "again", lambda step, steps, loss: seen.append((step, steps)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert seen == [(step, 30) for step in range(1, 31)]
    assert metrics["tokens"] > 0
    first = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_learn_what_one_does(checkpoint: Path, tmp_path: Path) -> None:
    build(replace(TINY, workers=2), 0, tmp_path / "shared")
    alone = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    shared = AutoModelForCausalLM.from_pretrained(tmp_path / "shared").state_dict()
    drift = max(float((alone[name] - shared[name]).abs().max()) for name in alone)
    assert drift < 0.02, "sums are added in another order, and nothing else differs"


def test_pre_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    build(TINY, 1, tmp_path / "seed", lambda step, steps, loss: losses.append(loss))
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_an_existing_directory_is_never_overwritten(checkpoint: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it"):
        build(TINY, 0, checkpoint)
