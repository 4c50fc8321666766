"""A checkpoint's digest changes with what decides the model, and with nothing else."""

from pathlib import Path

import pytest

from evolve.policy.checkpoint import DigestMismatch, digest, resolve, verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_digest_changes_with_every_file_that_decides_the_model(checkpoint: Path, name: str) -> None:
    before = digest(checkpoint)
    (checkpoint / name).write_bytes(b"other")
    assert digest(checkpoint) != before


def test_digest_ignores_other_files_and_the_directory_name(checkpoint: Path) -> None:
    before = digest(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    assert digest(checkpoint.rename(checkpoint.parent / "moved")) == before


def test_a_file_replaced_at_the_same_size_and_time_is_noticed(checkpoint: Path) -> None:
    import os

    before = digest(checkpoint)
    weights = checkpoint / "model.safetensors"
    stat = weights.stat()
    other = checkpoint / "new"
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(weights)
    assert digest(checkpoint) != before


def test_moving_bytes_between_files_changes_the_digest(checkpoint: Path) -> None:
    before = digest(checkpoint)
    (checkpoint / "config.json").rename(checkpoint / "generation_config.json")
    assert digest(checkpoint) != before


def test_another_checkpoint_is_refused(checkpoint: Path) -> None:
    assert verify(checkpoint, digest(checkpoint)) == verify(checkpoint, None)
    with pytest.raises(DigestMismatch, match="is not the expected"):
        verify(checkpoint, "0" * 64)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        digest(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        resolve(str(tmp_path / "absent"))
    assert resolve(str(tmp_path)) == str(tmp_path)
