"""Scripts that have a process and a Ray of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.object_store.use import environment

ROOT = Path(__file__).parents[1]


def told_by(script: str, directory: Path, *arguments: str, timeout_s: float = 600.0, **variables: str) -> Any:
    """What a script leaves in `told.json` of the directory that is its first argument; it has to end well.

    `variables`: of its environment.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory), *arguments],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((directory / "told.json").read_text())
