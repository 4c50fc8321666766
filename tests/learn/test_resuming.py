"""Checkpoints of an interrupted training: which are gone on from, and with how many workers."""

import hashlib
import json
from pathlib import Path

import pytest

from evolve.learn.jobs import RESULT_FILE, TrainJob
from evolve.learn.resuming import discard_checkpoints, find_checkpoint, workers_of_checkpoint
from evolve.learn.training import _prepare
from evolve.policy.checkpoint import digest
from evolve.schema import SFTConfig


def checkpoint(directory: Path, step: int, **meta: object) -> Path:
    """A checkpoint's directory, with what is said of it."""
    made = directory / f"checkpoint-{step}"
    made.mkdir()
    known = {"step": step, "plan": "plan", "workers": 2, "files": {}} | meta
    (made / "meta.json").write_text(json.dumps(known))
    return made


def test_a_checkpoint_of_another_plan_or_half_written_is_not_used(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "plan") == (0, None)
    checkpoint(tmp_path, 40).rename(tmp_path / ".checkpoint-40")
    assert find_checkpoint(tmp_path, "plan") == (0, None)
    for step in (9, 10):
        checkpoint(tmp_path, step)
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
    content = bytes(range(256)) * 8
    made = checkpoint(tmp_path, 5, files={"state/optimizer.pt": hashlib.sha256(content).hexdigest()})
    (made / "state").mkdir()
    (made / "state" / "optimizer.pt").write_bytes(content)
    assert find_checkpoint(tmp_path, "plan") == (5, None)
    (made / "state" / "optimizer.pt").write_bytes(content[:700] + b"!" + content[701:])
    step, complaint = find_checkpoint(tmp_path, "plan")
    assert step == 0
    assert complaint is not None
    assert "optimizer.pt is missing or damaged" in complaint
    (made / "state" / "optimizer.pt").unlink()
    assert find_checkpoint(tmp_path, "plan")[0] == 0


@pytest.mark.parametrize(
    "content",
    [b"", b'{"step": 5, "pl', b"\xff\xfe", b"[]", b"{}", b'{"step": "x", "plan": "", "workers": 2, "files": {}}'],
)
def test_a_checkpoint_whose_description_is_corrupt_is_damaged(tmp_path: Path, content: bytes) -> None:
    (checkpoint(tmp_path, 5) / "meta.json").write_bytes(content)
    step, complaint = find_checkpoint(tmp_path, "plan")
    assert step == 0
    assert complaint is not None
    assert "checkpoint-5/meta.json is damaged: starting afresh" in complaint
    assert workers_of_checkpoint(tmp_path) is None


def test_the_newest_checkpoint_says_how_many_workers_go_on_from_it(tmp_path: Path) -> None:
    assert workers_of_checkpoint(tmp_path) is None
    assert workers_of_checkpoint(tmp_path / "none") is None
    checkpoint(tmp_path, 9, workers=4)
    checkpoint(tmp_path, 10, workers=8)
    assert workers_of_checkpoint(tmp_path) == 8


def test_the_checkpoints_of_a_training_that_died_once_it_had_published_are_removed(tmp_path: Path) -> None:
    for name in ("initial", "output"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    (tmp_path / "rows.parquet").touch()
    job = TrainJob(SFTConfig(), f"{tmp_path}/initial", (f"{tmp_path}/rows.parquet",), f"{tmp_path}/output")
    known = {"job": job.digest(), "digest": digest(job.output), "metrics": {"loss": 0.5}}
    (tmp_path / "output" / RESULT_FILE).write_text(json.dumps(known))
    (tmp_path / "output.partial").mkdir()
    checkpoint(tmp_path / "output.partial", 5)
    for _ in range(2):
        done = _prepare(job)
        assert done is not None
        assert done.metrics == {"loss": 0.5}
        assert not (tmp_path / "output.partial").exists()
