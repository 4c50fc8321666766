"""The tests' object store in this process and in those it starts."""

import os
from pathlib import Path

import fsspec
import pytest

from evolve.remote import RemotePath

HERE = Path(__file__).parent


def objects_at(directory: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """The address of a bucket kept below `directory`, which must be absolute."""
    monkeypatch.syspath_prepend(str(HERE))
    fsspec.register_implementation("objects", "objects_of_tests.Objects", clobber=True)
    return RemotePath(f"objects://{directory}/runs")


def environment(**more: str) -> dict[str, str]:
    """For a process that is to find the store: this one's environment with it on PYTHONPATH, and nothing of Ray's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | more
