"""What a finished run came to, for the comparison of two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.chaos.plan import ROUNDS
from evolve.disk import asides
from evolve.files import file_digest
from evolve.policy.checkpoint import digest
from evolve.store.run import RunDirectory


def outcome(directory: Path) -> dict[str, Any]:
    """What must be equal: digests of every tree, of the rows and of the checkpoints, and the evaluations."""
    run = RunDirectory(directory)
    found: dict[str, Any] = {"base": run.round(0).manifest().get("base", {}).get("digest", "")}
    for k in range(ROUNDS + 1):
        manifest = run.round(k).manifest()
        trees: dict[str, str] = {}
        roots = 0
        for name in sorted(manifest.get("search", {}).get("parts", {})):
            for row in pq.read_table(run.round(k).trees / name).to_pylist():
                key = f"{row['problem_id']}/{row['tree']}"
                trees[key] = _hash(trees.get(key, ""), row)
                roots += row["node"] == 0
        found[f"trees {k}"] = trees
        found[f"trees twice {k}"] = roots - len(trees)
        for stage in ("sft", "ppm"):
            rows = run.round(k).path / stage / "rows.parquet"
            found[f"{stage} rows {k}"] = _hash("", pq.read_table(rows).to_pylist()) if rows.exists() else ""
            found[f"{stage} checkpoint {k}"] = manifest.get(stage, {}).get("digest", "")
        found[f"evaluation {k}"] = manifest.get("evaluation", {}).get("rows")
    return found


def _hash(before: str, value: Any) -> str:
    return hashlib.sha256((before + json.dumps(value, sort_keys=True, default=str)).encode()).hexdigest()


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Names of what is not as it must be.

    `exact`: everything is to be equal. Otherwise, for engines whose samples depend on what else they are sampling:
    both have the first tree of the same problems, and the same artefacts, whatever these contain.
    """
    if exact:
        return [name for name in expected if expected[name] != found.get(name)]
    return [name for name in expected if _kind(name, expected[name]) != _kind(name, found.get(name))]


def _kind(name: str, value: Any) -> Any:
    if name.startswith("trees twice"):
        return 0
    if name.startswith("trees"):
        return {key for key in value if key.endswith("/0")}
    return value if name == "base" else bool(value)


def damage(directory: Path) -> list[str]:
    """What is not as the run's own manifests say: checkpoints by digest, parts by digest, no file left aside."""
    run = RunDirectory(directory)
    wrong: list[str] = []
    for k in range(ROUNDS + 1):
        manifest, place = run.round(k).manifest(), run.round(k)
        for stage in ("sft", "ppm"):
            if stage in manifest and digest(place.path / stage / "checkpoint") != manifest[stage]["digest"]:
                wrong.append(f"{stage} checkpoint of round {k}")
        parts = manifest.get("search", {}).get("parts", {})
        wrong += [name for name, known in parts.items() if file_digest(place.trees / name) != known]
        wrong += [path.name for path in place.trees.glob("part-*") if path.name not in parts]
    return wrong + [str(path) for path in (*directory.glob("*lock.json"), *asides(directory))]


def resumptions(directory: Path) -> list[str]:
    """From which step each training that was interrupted went on."""
    run = RunDirectory(directory)
    found = []
    for k in range(1, ROUNDS + 1):
        for stage in ("sft", "ppm"):
            metrics = run.round(k).manifest()[stage]["metrics"]
            if metrics["resumed_from"]:
                found.append(f"{stage} {k} from step {metrics['resumed_from']} of {metrics['steps']}")
    return found
