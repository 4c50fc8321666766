"""Step pairs packed as tries: the same scores as sequences alone, and the pairwise loss."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.learn import rows
from evolve.learn.data import gather_rows, load_data
from evolve.learn.forest import Pairs, build_trie, trie_size
from evolve.learn.jobs import TrainJob
from evolve.learn.packing import lay_out
from evolve.learn.split import held_out
from evolve.schema import PPMConfig, ScoreForm
from evolve.types import StepPair


def packed(some: list[StepPair], break_even: float = 1e9, **limits: int) -> Pairs:
    arguments = {"max_length": 512, "budget": 512, "batch": 1000, **limits}
    return Pairs(rows.to_table(some), break_even=break_even, **arguments)


def tensors(batch: Any) -> dict[str, Any]:
    import torch

    return {f.name: torch.from_numpy(getattr(batch, f.name)) for f in fields(batch)}


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=8))
def test_a_trie_spells_every_sequence_and_lets_it_see_only_itself(sequences: list[list[int]]) -> None:
    arrays = [np.array(s, dtype=np.int32) for s in sequences]
    trie = build_trie(arrays)
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(trie.ids) == trie_size(arrays) == len(prefixes), "what is shared is stored once"
    for sequence, path in zip(sequences, trie.paths, strict=True):
        assert trie.ids[path].tolist() == sequence
        assert trie.positions[path].tolist() == list(range(len(sequence)))
        for i, token in enumerate(path):
            assert np.flatnonzero(trie.attends[token]).tolist() == sorted(path[: i + 1].tolist())


def alone(model: Any, pair: StepPair, side: str, form: ScoreForm) -> Any:
    """A continuation's score from its own unpacked sequence."""
    import torch

    ids = torch.tensor([[*pair.prefix_ids, *getattr(pair, f"{side}_ids")]])
    if form is ScoreForm.head:
        return model(input_ids=ids).logits[0, 0]
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    sampled = getattr(pair, f"{side}_sampled")
    at = [len(pair.prefix_ids) + i for i, s in enumerate(sampled) if s]
    return sum(logprobs[i - 1, ids[0, i]] for i in at)


@pytest.mark.parametrize("form", list(ScoreForm))
@pytest.mark.parametrize("break_even", [1.0, 1e9])
def test_loss_and_gradient_equal_those_of_unpacked_pairs(
    tiny_model: Path, form: ScoreForm, break_even: float, step_pairs: Callable[..., list[StepPair]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from evolve.learn.ppm import PPMObjective

    torch.manual_seed(0)
    load = AutoModelForSequenceClassification if form is ScoreForm.head else AutoModelForCausalLM
    extra = {"num_labels": 1} if form is ScoreForm.head else {}
    model = load.from_pretrained(tiny_model, **extra).eval()
    some = step_pairs(3)
    inserted = [
        replace(p, positive_ids=(*p.positive_ids, 3), positive_sampled=(*p.positive_sampled, False)) for p in some[:4]
    ]
    some = inserted + some[4:-1]  # environment output in one node; another node with 3 pairs left of 4
    beta = 0.7
    sizes = {id(p): sum((q.problem_id, q.node) == (p.problem_id, p.node) for q in some) for p in some}
    expected = torch.zeros(())
    for p in some:
        margin = alone(model, p, "positive", form) - alone(model, p, "negative", form)
        expected = expected - torch.nn.functional.logsigmoid(beta * margin) / sizes[id(p)]
    expected.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    data = packed(some, break_even)
    assert (len(data.lengths) > 3) == (break_even == 1.0), "nodes of a tree are joined only where it pays"
    assert data.weights.sum() == pytest.approx(9.0), "each of nine nodes weighs 1 after filtering"
    objective = PPMObjective(model, form, beta)
    total, right = torch.zeros(()), 0
    for batch in lay_out(range(len(data.lengths)), data.lengths, 256):
        loss, correct, _ = objective(**tensors(data.collate(batch, 0)))
        total, right = total + loss, right + int(correct)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)
    assert 0 < right < len(some)


def test_the_anchor_is_the_mean_squared_drift_of_every_pair(
    tiny_model: Path, step_pairs: Callable[..., list[StepPair]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evolve.learn.ppm import PPMObjective

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    some = step_pairs(3)
    data = packed(some)
    batches = lay_out(range(len(data.lengths)), data.lengths, 256)
    plain, anchored = PPMObjective(model, ScoreForm.logprob, 0.7), PPMObjective(model, ScoreForm.logprob, 0.7, 2.0)
    with torch.no_grad():
        for batch in batches:
            measured, start = plain(**tensors(data.collate(batch, 0)))[2], 0
            for item in (item for row in batch for item in row):
                first, end = data.offsets[item], data.offsets[item + 1]
                data.reference[first:end] = measured[start : start + end - first].numpy()
                start += end - first
        before = [float(plain(**tensors(data.collate(b, 0)))[0]) for b in batches]
        assert [float(anchored(**tensors(data.collate(b, 0)))[0]) for b in batches] == pytest.approx(before)

        data.reference += np.float32(0.5)  # as if every token had lost half a nat
        drifted = [float(anchored(**tensors(data.collate(b, 0)))[0]) for b in batches]
    assert sum(drifted) - sum(before) == pytest.approx(2.0 * 0.5 * 0.5**2 * data.weights.sum(), rel=1e-4)


@pytest.mark.parametrize("form", list(ScoreForm))
def test_a_worker_without_pairs_still_takes_part(
    tiny_model: Path, form: ScoreForm, step_pairs: Callable[..., list[StepPair]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from evolve.learn.ppm import PPMObjective

    if form is ScoreForm.head:
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    loss, *_ = PPMObjective(model, form, 1.0, anchor=1.0)(**tensors(packed(step_pairs(1)).collate([], 0)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(math.isfinite(float(p.grad.sum())) for p in model.parameters() if p.grad is not None)


def test_a_pair_that_is_too_long_is_dropped_whole_and_the_weights_follow(
    step_pairs: Callable[..., list[StepPair]],
) -> None:
    some = step_pairs(1, nodes=1)
    long = replace(some[0], negative_ids=(5,) * 30, negative_sampled=(True,) * 30)
    data = packed([long, *some[1:]], max_length=20)
    assert (data.overlong, data.pairs) == (1, 3)
    batch = data.collate([[0]], 0)
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_items_respect_the_budget_and_the_batch(step_pairs: Callable[..., list[StepPair]]) -> None:
    some = step_pairs(4, nodes=5)
    data = packed(some, budget=60, batch=6)
    assert max(data.lengths) <= 60
    assert max(data.sizes) <= 6
    assert data.sizes.sum() == len(some)
    assert data.weights.sum() == pytest.approx(20.0)


def test_pairs_are_grouped_by_node_and_tree_in_the_order_of_their_keys(
    step_pairs: Callable[..., list[StepPair]],
) -> None:
    some = step_pairs(6, nodes=3)
    some = [*some, replace(some[0], tree=1), replace(some[0], kind="trajectory"), replace(some[4], round=2)]
    places = np.random.default_rng(0).permutation(len(some)).tolist()
    data = packed([some[i] for i in places], break_even=1e-9)  # nothing is merged: an item a node
    keys = [(some[i].problem_id, some[i].round, some[i].tree, some[i].kind, some[i].node) for i in places]
    found = [[keys[pair] for pair in item] for item in data._items]
    assert all(len(set(item)) == 1 for item in found)
    assert [item[0] for item in found] == sorted(set(keys))
    assert data.weights == pytest.approx(np.ones(len(found)))


def test_no_pairs_make_no_items() -> None:
    data = Pairs(rows.to_table([], StepPair), max_length=512, break_even=1e9, budget=512, batch=8)
    assert (data.pairs, len(data.lengths), data.overlong, data.unsupervised) == (0, 0, 0, 0)


def test_no_problem_is_on_both_sides_of_the_split(tmp_path: Path, step_pairs: Callable[..., list[StepPair]]) -> None:
    some = step_pairs(40)
    rows.write(rows.to_table(some), tmp_path / "pairs.parquet")
    config = PPMConfig(validation_share=0.3)
    job = TrainJob(config, "", (str(tmp_path / "pairs.parquet"),), str(tmp_path / "checkpoint"))
    gather_rows(job)
    train, validation = load_data(job, 64)
    assert validation is not None
    held = {p.problem_id for p in some if held_out(p.problem_id, 0.3)}
    assert 0 < len(held) < 40
    assert validation.pairs == sum(p.problem_id in held for p in some)
    assert train.sizes.sum() == len(some) - validation.pairs
    none_held = replace(job, config=replace(config, validation_share=0.0))
    gather_rows(none_held)
    train, validation = load_data(none_held, 64)
    assert (train.sizes.sum(), validation.pairs) == (len(some), 0)
