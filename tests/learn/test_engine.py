"""What surrounds a DeepSpeed engine."""

from itertools import pairwise
from pathlib import Path

import pytest

from evolve.schema import SFTConfig


def test_rotary_frequencies_are_restored_to_fp32(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evolve.learn.engine import restore_rotary, wrong_rotary

    sound = AutoModelForCausalLM.from_pretrained(tiny_model)
    damaged = AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16()
    assert wrong_rotary(damaged), "the damage this guards against"
    assert not torch.equal(damaged.model.rotary_emb.inv_freq.float(), sound.model.rotary_emb.inv_freq)
    restore_rotary(damaged)
    assert wrong_rotary(damaged) == []
    assert torch.equal(damaged.model.rotary_emb.inv_freq, sound.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_then_falls_towards_zero(schedule: str) -> None:
    from evolve.learn.engine import learning_rate

    config = SFTConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.2
