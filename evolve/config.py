"""Configuration: load, merge, override, validate. Imports nothing heavy.

A configuration is made of layers, each over the one before: the schema's defaults,
`conf/default.yaml`, the recipe (`conf=NAME|PATH`), and `key=value` arguments. Every layer is read
against the schema of `evolve.schema`, so that a key or a value that would do nothing, or something
else than was meant, is an error that says where it stands and how to mend it. All errors of all
layers are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evolve.checks import Finding, findings
from evolve.files import Place
from evolve.reading import Complaint, Reader, Setting
from evolve.schema import EvolveConfig, RoundConfig
from evolve.types import RoundPlan

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
"""Where `conf=NAME` is looked for: beside the package, whatever the working directory."""

USAGE = """usage: python -m evolve.driver [conf=NAME|PATH] [round=K] [key=value ...] [--plan] [--help]

  conf=NAME|PATH  a recipe: conf/NAME.yaml ({recipes}) or a YAML file; default: default
  round=K         run round K alone; it needs what round K-1 left in the run directory
  key=value       set a key, e.g. search.rollouts=32, search.escalation=[64,128], rounds.3.candidates=16
                  (rounds count from 1; a search.* value given here holds for every round)
  --plan          print configuration, placement, trees, tokens, disk and GPU-hours; start nothing
  --help          this text

Every key, with its default:

"""

_ROUND_FIELDS = tuple(f.name for f in dataclasses.fields(RoundConfig) if f.name != "generator")

_NO_EFFECT_ON_RESULTS = {
    "run.name",
    "run.dir",
    "run.allow_changes",
    "round",
    "toy.workers",
    "search.concurrent_trees",
    "verifier.supervisors",
    "verifier.queue",
    "verifier.snapshot_mb",
}
"""Keys that may change between two starts of one run; so may `cluster.*`, `wandb.*`, time limits."""

_NO_EFFECT_ENDINGS = (
    ".start_timeout_s",
    ".request_timeout_s",
    ".timeout_s",
    ".gpus",
    ".gpu_memory_utilization",
    ".cpu_kv_cache_gib",
    ".max_num_seqs",
    ".enforce_eager",
    ".cpus_per_worker",
    ".checkpoint_steps",
)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration: each with what, where, and how to mend it."""

    def __init__(self, complaints: Sequence[Complaint]) -> None:
        self.complaints = tuple(complaints)
        count = len(self.complaints)
        head = "1 error" if count == 1 else f"{count} errors"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  {c}" for c in self.complaints))


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: EvolveConfig
    plan: bool
    """Whether `--plan` was given: print the plan, start nothing."""


@dataclass
class _Arguments:
    conf: str = "default"
    overrides: list[str] = field(default_factory=list)
    plan: bool = False
    help: bool = False
    complaints: list[Complaint] = field(default_factory=list)


def command(argv: Sequence[str]) -> Command:
    """Parse a command line. `--help` prints the usage and exits with status 0.

    Raises:
        ConfigError: naming everything that is wrong with it.
    """
    arguments = _parse(argv)
    if arguments.help:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    return Command(_resolve(arguments), arguments.plan)


def load(argv: Sequence[str]) -> EvolveConfig:
    """The validated configuration of a command line (`conf=…`, `key=value`, `--plan` ignored).

    Raises:
        ConfigError: naming everything that is wrong with it.
    """
    return command(argv).config


def read(path: Place) -> EvolveConfig:
    """A resolved configuration as `to_yaml` wrote it, alone: nothing is merged over or under it.

    Raises:
        ConfigError: it is not a configuration of this version's schema.
    """
    reader = Reader(EvolveConfig)
    settings = reader.file(path)
    if reader.complaints:
        raise ConfigError(reader.complaints)
    return _to_object(_merge(OmegaConf.structured(EvolveConfig), settings))


def help_text() -> str:
    """The usage, and every key with its comment as `conf/default.yaml` has it."""
    return USAGE.format(recipes=", ".join(_recipes())) + (CONF_DIR / "default.yaml").read_text("utf-8")


def validate(config: EvolveConfig) -> None:
    """Refuse impossible values and combinations.

    Raises:
        ConfigError: naming all of them.
    """
    _refuse(findings(config), {})


def resolve_round(config: EvolveConfig, k: int) -> RoundPlan:
    """Round `k` (from 1) with what it leaves out filled in from `search`.

    Raises:
        IndexError: there is no such round.
    """
    if not 1 <= k <= len(config.rounds):
        raise IndexError(f"round {k} does not exist: the recipe has rounds 1 to {len(config.rounds)}")
    own = config.rounds[k - 1]
    values = {name: getattr(own, name) for name in _ROUND_FIELDS}
    filled = {n: getattr(config.search, n) if v is None else v for n, v in values.items()}
    filled["escalation"] = tuple(filled["escalation"])
    return RoundPlan(round=k, generator=own.generator, **filled)


def differences(a: EvolveConfig, b: EvolveConfig) -> list[tuple[str, Any, Any]]:
    """(key, value in `a`, value in `b`) of every key that differs and can change results.

    Names, directories, `cluster.*`, `wandb.*`, time limits and sizes that only change speed are left
    out: a run may be continued on another machine.
    """
    left, right = dict(_flatten(a)), dict(_flatten(b))
    return [
        (key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and _changes_results(key)
    ]


def to_yaml(config: EvolveConfig) -> str:
    """The whole configuration as YAML that `read` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _changes_results(key: str) -> bool:
    return not (
        key in _NO_EFFECT_ON_RESULTS or key.startswith(("cluster.", "wandb.")) or key.endswith(_NO_EFFECT_ENDINGS)
    )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of a configuration; rounds are numbered from 1."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _flatten(getattr(value, f.name), f"{prefix}.{f.name}" if prefix else f.name)
    elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
        for number, item in enumerate(value, start=1):
            yield from _flatten(item, f"{prefix}.{number}")
    else:
        yield prefix, value.name if isinstance(value, Enum) else value


def _recipes() -> list[str]:
    return sorted(path.stem for path in CONF_DIR.glob("*.yaml"))


def _parse(argv: Sequence[str]) -> _Arguments:
    arguments, conf = _Arguments(), []
    for argument in argv:
        if argument in ("--plan", "--help", "-h"):
            arguments.plan |= argument == "--plan"
            arguments.help |= argument != "--plan"
        elif argument.startswith("conf="):
            conf.append(argument.removeprefix("conf="))
        elif argument.startswith("-") or "=" not in argument:
            mend = "arguments are conf=NAME, key=value, --plan and --help"
            arguments.complaints.append(Complaint("not understood", f"command line: {argument}", mend))
        else:
            arguments.overrides.append(argument)
    if len(conf) > 1:
        given = " ".join(f"conf={c}" for c in conf)
        arguments.complaints.append(Complaint("given twice", f"command line: {given}", "give one recipe"))
    arguments.conf = conf[0] if conf else "default"
    return arguments


def _recipe_file(conf: str, complaints: list[Complaint]) -> Path | None:
    is_path = conf.endswith((".yaml", ".yml")) or "/" in conf
    path = Path(conf).expanduser() if is_path else CONF_DIR / f"{conf}.yaml"
    if path.is_file():
        return path
    known = _recipes()
    near = difflib.get_close_matches(conf, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    mend = "give the path of a YAML file" if is_path else f"{hint}recipes in {CONF_DIR}: {', '.join(known)}"
    complaints.append(Complaint(f"no recipe {path}", f"command line: conf={conf}", mend))
    return None


def _resolve(arguments: _Arguments) -> EvolveConfig:
    reader = Reader(EvolveConfig)
    reader.complaints.extend(arguments.complaints)
    layers = [reader.file(CONF_DIR / "default.yaml")]
    recipe = _recipe_file(arguments.conf, reader.complaints)
    if recipe is not None and recipe.resolve() != CONF_DIR / "default.yaml":
        layers.append(reader.file(recipe))
    layers.append(reader.arguments(arguments.overrides))
    if reader.complaints:
        raise ConfigError(reader.complaints)
    merged: DictConfig = OmegaConf.structured(EvolveConfig)
    places: dict[str, str] = {}
    for layer in layers:
        merged = _merge(merged, layer)
        places.update((setting.key, setting.place) for setting in layer)
    config = _to_object(merged)
    _refuse(findings(config), places)
    return config


def _merge(below: DictConfig, layer: Sequence[Setting]) -> DictConfig:
    """One layer over the others.

    A layer's `search.X` clears X of the rounds it has inherited, which would hide it otherwise: an
    override that silently does nothing is worse than one that reaches too far. Rounds that the same
    layer states keep what they state.
    """
    merged: DictConfig = OmegaConf.merge(below)  # type: ignore[assignment]
    states_rounds = any(setting.key == "rounds" for setting in layer)
    for setting in layer:
        name = setting.key.removeprefix("search.")
        if setting.key != name and name in _ROUND_FIELDS and not states_rounds:
            for own in merged.rounds:
                own[name] = None
    complaints = []
    for setting in sorted(layer, key=lambda s: s.key != "rounds"):
        head, _, rest = setting.key.partition(".")
        key = setting.key
        if head == "rounds" and rest:
            number, _, name = rest.partition(".")
            if int(number) > len(merged.rounds):
                what = f"{key}: there is no round {number}"
                mend = f"the recipe has rounds 1 to {len(merged.rounds)}"
                complaints.append(Complaint(what, setting.place, mend))
                continue
            key = f"rounds[{int(number) - 1}].{name}"
        try:
            OmegaConf.update(merged, key, setting.value, merge=False)
        except OmegaConfBaseException as error:
            what = f"{setting.key}: {str(error).splitlines()[0]}"
            complaints.append(Complaint(what, setting.place, "see the key's comment in conf/default.yaml"))
    if complaints:
        raise ConfigError(complaints)
    return merged


def _to_object(merged: DictConfig) -> EvolveConfig:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        what, where = str(error).splitlines()[0], str(getattr(error, "full_key", None) or "interpolation")
        raise ConfigError([Complaint(what, where, "mend the ${...} reference")]) from error
    assert isinstance(config, EvolveConfig)
    return config


def _refuse(found: Sequence[Finding], places: Mapping[str, str]) -> None:
    complaints = []
    for finding in found:
        # A key in a list that was set as a whole has the list's place.
        keys = (finding.key.rsplit(".", cut)[0] for cut in range(finding.key.count(".") + 1))
        place = next((places[key] for key in keys if key in places), "the schema's defaults")
        complaints.append(Complaint(f"{finding.key}: {finding.what}", place, finding.mend))
    if complaints:
        raise ConfigError(complaints)
