"""What surrounds a DeepSpeed engine."""

import json
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


def test_a_checkpoint_of_another_plan_or_half_written_is_not_used(tmp_path: Path) -> None:
    from evolve.learn.engine import discard_checkpoints, find_checkpoint

    assert find_checkpoint(tmp_path, "plan") == (0, None)
    (tmp_path / ".checkpoint-40").mkdir()
    (tmp_path / ".checkpoint-40" / "meta.json").write_text('{"step": 40, "plan": "plan", "files": {}}')
    assert find_checkpoint(tmp_path, "plan") == (0, None)
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "meta.json").write_text(f'{{"step": {step}, "plan": "plan", "files": {{}}}}')
    assert find_checkpoint(tmp_path, "plan") == (10, None)
    step, complaint = find_checkpoint(tmp_path, "other plan")
    assert step == 0
    assert complaint is not None
    assert "starting afresh" in complaint
    discard_checkpoints(tmp_path, but=10)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    discard_checkpoints(tmp_path)
    assert find_checkpoint(tmp_path, "other plan") == (0, None)


def test_a_checkpoint_with_a_flipped_byte_is_not_used(tmp_path: Path) -> None:
    import hashlib

    from evolve.learn.engine import find_checkpoint

    content = bytes(range(256)) * 8
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "optimizer.pt").write_bytes(content)
    known = {"state/optimizer.pt": hashlib.sha256(content).hexdigest()}
    (checkpoint / "meta.json").write_text(json.dumps({"step": 5, "plan": "plan", "files": known}))
    assert find_checkpoint(tmp_path, "plan") == (5, None)
    (checkpoint / "state" / "optimizer.pt").write_bytes(content[:700] + b"!" + content[701:])
    step, complaint = find_checkpoint(tmp_path, "plan")
    assert step == 0
    assert complaint is not None
    assert "optimizer.pt is missing or damaged" in complaint
    (checkpoint / "state" / "optimizer.pt").unlink()
    assert find_checkpoint(tmp_path, "plan")[0] == 0
