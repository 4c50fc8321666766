"""Packed rows: the same loss as sequences alone, and nothing lost."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evolve.learn import rows
from evolve.learn.errors import LearningError
from evolve.learn.packing import IGNORED, Completions, lay_out, plan_steps, worker_batches
from evolve.types import Trajectory


def tensors(batch: Any) -> dict[str, Any]:
    import torch

    return {f.name: torch.from_numpy(getattr(batch, f.name)) for f in fields(batch)}


@pytest.fixture
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def completions(trajectories: Callable[..., list[Trajectory]]) -> Completions:
    return Completions(rows.to_table(mixed(trajectories)), 512)


def mixed(trajectories: Callable[..., list[Trajectory]]) -> list[Trajectory]:
    """Three long ones and six short ones, so that rows are shared."""
    return trajectories(3, seed=1, length=30) + trajectories(6)


def test_packed_loss_and_gradient_equal_those_of_sequences_alone(
    model: Any, completions: Completions, trajectories: Callable[..., list[Trajectory]]
) -> None:
    import torch

    from evolve.learn.sft import SFTObjective

    alone = torch.zeros(())
    for t in mixed(trajectories):
        ids = torch.tensor([[*t.prompt_ids, *t.token_ids]])
        keep = torch.tensor([[False] * len(t.prompt_ids) + list(t.sampled)])
        labels = torch.where(keep, ids, torch.tensor(IGNORED))
        logits = model(input_ids=ids).logits
        alone = alone + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum"
        )
    alone.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    packed = torch.zeros(())
    layout = lay_out(list(range(9)), completions.lengths, 256)
    assert max(len(row) for batch in layout for row in batch) > 1, "rows must really be shared"
    for batch in layout:
        packed = packed + SFTObjective(model)(**tensors(completions.collate(batch, 0)))[0]
    packed.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)


def test_a_sequence_does_not_see_its_neighbours_in_the_row(
    model: Any, trajectories: Callable[..., list[Trajectory]]
) -> None:
    import torch

    from evolve.learn.sft import supervised_logits

    def second_logits(first: Trajectory, second: Trajectory) -> Any:
        items = Completions(rows.to_table([first, second]), 512)
        batch = items.collate([[0, 1]], 0)
        t = tensors(batch)
        logits = supervised_logits(model, t["input_ids"], t["position_ids"], None, t["rows"], t["columns"])
        return logits[sum(first.sampled) :]

    first, second = trajectories(2)
    changed = replace(first, prompt_ids=tuple(2 + (t + 5) % 60 for t in first.prompt_ids))
    with torch.no_grad():
        torch.testing.assert_close(second_logits(first, second), second_logits(changed, second), rtol=0, atol=1e-6)


def test_only_sampled_tokens_after_the_first_are_supervised(
    completions: Completions, trajectories: Callable[..., list[Trajectory]]
) -> None:
    first, second = mixed(trajectories)[:2]
    batch = completions.collate([[0, 1]], 0)
    labels = completions.labels(batch)[0]
    expected: list[int] = []
    for t in (first, second):
        expected += [IGNORED] * len(t.prompt_ids)
        expected += [i if s else IGNORED for i, s in zip(t.token_ids, t.sampled, strict=True)]
    assert labels.tolist() == expected + [IGNORED] * (len(labels) - len(expected))
    starts = np.flatnonzero(batch.position_ids[0] == 0)
    assert starts.tolist() == [0, int(completions.lengths[0]), len(expected)], "the padding is a segment too"
    assert all(labels[s] == IGNORED for s in starts)


def test_a_trajectory_without_a_prompt_does_not_predict_its_first_token(
    trajectories: Callable[..., list[Trajectory]],
) -> None:
    t = replace(trajectories(1)[0], prompt_ids=(), token_ids=(5, 6, 7), sampled=(True, True, True))
    items = Completions(rows.to_table([t]), 512)
    assert items.labels(items.collate([[0]], 0))[0, :3].tolist() == [IGNORED, 6, 7]


def test_long_rows_are_dropped_and_counted_never_cut(trajectories: Callable[..., list[Trajectory]]) -> None:
    some = trajectories(40)
    limit = 20
    fitting = [t for t in some if len(t.prompt_ids) + len(t.token_ids) <= limit]
    items = Completions(rows.to_table(some), limit)
    assert 0 < len(fitting) < 40
    assert items.overlong == 40 - len(fitting)
    assert items.lengths.tolist() == [len(t.prompt_ids) + len(t.token_ids) for t in fitting]


def test_rows_that_supervise_nothing_are_dropped_and_counted(
    trajectories: Callable[..., list[Trajectory]],
) -> None:
    good, bad = trajectories(2)
    items = Completions(rows.to_table([replace(bad, sampled=(False,) * len(bad.token_ids)), good]), 512)
    assert (items.unsupervised, len(items.lengths)) == (1, 1)
    with pytest.raises(LearningError, match="nothing to train on"):
        plan_steps(np.zeros(0, np.int64), 4, 1, 0)


def test_every_epoch_visits_every_item_once_in_a_new_order() -> None:
    steps = plan_steps(np.ones(10, np.int64), 4, 2.0, 3)
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    epochs = [np.concatenate(steps[:3]).tolist(), np.concatenate(steps[3:]).tolist()]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert all((a == b).all() for a, b in zip(steps, plan_steps(np.ones(10, np.int64), 4, 2.0, 3), strict=True))


def test_a_fractional_epoch_is_cut_short_and_large_items_stand_alone() -> None:
    assert len(plan_steps(np.ones(8, np.int64), 2, 1.5, 0)) == 6
    sizes = np.array([9, 1, 1, 1])
    assert sorted(int(sizes[s].sum()) for s in plan_steps(sizes, 4, 1, 0))[-1] == 9


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_step_without_loss_and_in_step(workers: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 50)
    items = list(range(3, 50))
    shares = [worker_batches(items, lengths, 200, workers, rank) for rank in range(workers)]
    assert len({len(batches) for batches in shares}) == 1
    assert sorted(i for batches in shares for b in batches for row in b for i in row) == items
    for batches in shares:
        for batch in batches:
            longest = max((sum(lengths[i] for i in row) for row in batch), default=0)
            assert len(batch) * longest <= 200


def test_a_worker_without_rows_still_takes_part(model: Any, completions: Completions) -> None:
    from evolve.learn.sft import SFTObjective

    loss, right = SFTObjective(model)(**tensors(completions.collate([], 0)))
    loss.backward()
    assert (loss.item(), int(right)) == (0.0, 0)
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.parameters() if p.grad is not None)
