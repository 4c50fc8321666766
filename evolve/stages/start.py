"""Whether a run goes on as it was begun: under the same configuration, with the same problems and base model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from evolve.config import differences, read, to_yaml
from evolve.files import publish_file, publish_json
from evolve.policy.checkpoint import digest, resolve
from evolve.problems import ProblemSet
from evolve.schema import EvolveConfig
from evolve.stages.changes import affected
from evolve.store.run import RunDirectory, RunError


def inputs_of(config: EvolveConfig, problems: ProblemSet) -> dict[str, str]:
    """The digest of what a run reads from elsewhere, by the key that names it. The tiny world's model is not."""
    found = {"problems.path": problems.digest()}
    if config.policy.model != "toy":
        found["policy.model"] = digest(resolve(config.policy.model, config.policy.revision))
    return found


def check_same_start(config: EvolveConfig, directory: RunDirectory, inputs: Mapping[str, str]) -> None:
    """Compare the resolved configuration and the inputs with those that the run was started with.

    Raises:
        RunError: they differ, and `run.allow_changes` is not set; with what would have changed of what is finished.
    """
    if config.run.allow_changes:
        return
    what = "under another configuration"
    changed = differences(read(directory.config), config) if directory.config.exists() else []
    said = {key: f"{old!r} -> {new!r}" for key, old, new in changed}
    if not said:
        what = "with other inputs"
        names = {"problems.path": config.problems.path, "policy.model": config.policy.model}
        said = {
            key: f"the content of {names[key]} has changed, its digest from {old[:12]} to {inputs[key][:12]}"
            for key, old in _known_inputs(directory).items()
            if old != inputs.get(key, old)
        }
    if said:
        finished = {k: directory.round(k).manifest() for k in range(len(config.rounds) + 1)}
        lines = [f"  {key}: {change}\n{_would_change(key, finished)}" for key, change in said.items()]
        raise RunError(
            f"{directory.path} was started {what}:\n" + "\n".join(lines) + "\n"
            "Use another run.name, or run.allow_changes=true to continue: what is finished stays as it is."
        )


def _known_inputs(directory: RunDirectory) -> dict[str, str]:
    if not directory.inputs.exists():
        return {}
    try:
        known: dict[str, str] = json.loads(directory.inputs.read_text())
    except ValueError as error:
        raise RunError(
            f"{directory.inputs} is not readable ({error}). Delete it if problems and model are the same still."
        ) from error
    return known


def record_start(config: EvolveConfig, directory: RunDirectory, inputs: Mapping[str, str]) -> None:
    """Keep both with the run, for whoever continues it."""
    publish_file(directory.config, lambda aside: aside.write_text(to_yaml(config)))
    publish_json(directory.inputs, inputs)


def _would_change(key: str, finished: Mapping[int, Iterable[str]]) -> str:
    found = affected(key, finished)
    return f"    would have changed {'; '.join(found) if found else 'nothing that is finished'}"
