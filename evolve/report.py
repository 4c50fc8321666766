"""What a run has found: `report.json`, tables on the terminal, metrics as JSON lines, Weights & Biases.

`report.json`:

    run, config_digest
    base          digest, seconds and metrics of the tiny world's base model; empty for any other
    rounds[]      one entry a round that was begun, round 0 being the base model, with
      round
      search      trees, rollouts, problems, solved, coverage by difficulty {level: [solved, problems]}, classes
                  {easy, medium, hard}, sampled_tokens, executions, infrastructure_failures, parts {file: digest},
                  policy (digest), sandboxes[] {tier, missing}, seconds
      sft, ppm    rows, metrics (PPM: pair_accuracy on held-out problems), digest, seconds
      evaluation  rows[]: method, accuracy {value, low, high}, problems, tokens, scored_tokens, detail; problems,
                  skipped, seconds
      seconds     by stage

Intervals are 95 % bootstrap intervals over problems; `detail.minus_majority` is the paired difference to the vote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from evolve.config import to_yaml
from evolve.files import Lines, mirror, publish_json, workshop
from evolve.progress import duration
from evolve.schema import EvolveConfig, WandbMode
from evolve.store.run import RunDirectory

STAGES = ("search", "sft", "ppm", "evaluation")
FINISH_S = 30.0
"""For W&B to upload what is left of a round when the run ends; by itself it waits until the network is back."""


def build(run: RunDirectory, config: EvolveConfig) -> dict[str, Any]:
    """The report of everything that the manifests name; written to `report.json` and returned."""
    rounds = []
    for number in range(len(config.rounds) + 1):
        manifest = run.round(number).manifest()
        if not manifest:
            continue
        entry: dict[str, Any] = {"round": number}
        entry |= {stage: manifest[stage] for stage in STAGES if stage in manifest}
        entry["seconds"] = {stage: manifest[stage].get("seconds", 0.0) for stage in STAGES if stage in manifest}
        rounds.append(entry)
    base = run.round(0).manifest().get("base", {})
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    report = {"run": config.run.name, "config_digest": digest, "base": base, "rounds": rounds}
    publish_json(run.report, report)
    return report


def show_round(report: Mapping[str, Any], number: int, console: Console) -> None:
    """Print the tables of one round."""
    entry = next((e for e in report["rounds"] if e["round"] == number), None)
    if entry is None:
        return
    name = "Base model" if number == 0 else f"Round {number}"
    if "search" in entry:
        search = entry["search"]
        table = Table(title=f"{name}: search", title_justify="left")
        for column in ("difficulty", "problems", "solved", "coverage"):
            table.add_column(column, justify="right")
        for level, (solved, problems) in search["coverage"].items():
            table.add_row(level, str(problems), str(solved), f"{solved / problems:.1%}")
        table.add_row(
            "all", str(search["problems"]), str(search["solved"]), f"{search['solved'] / search['problems']:.1%}"
        )
        console.print(table)
    if "evaluation" in entry:
        console.print(evaluation_table(entry["evaluation"]["rows"], f"{name}: held-out problems"))


def evaluation_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line a method, from `EvalRow`s as dictionaries."""
    caption = "tokens: sampled for a problem; PPM tokens: read by the PPM for a problem"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("method", "correct", "95 % interval", "problems", "tokens", "PPM tokens", "minus majority"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        accuracy, detail = row["accuracy"], row["detail"]
        paired = (
            f"{detail['minus_majority']:+.1%} [{detail['minus_majority_low']:+.1%}, "
            f"{detail['minus_majority_high']:+.1%}]"
            if "minus_majority" in detail
            else ""
        )
        table.add_row(
            row["method"],
            f"{accuracy['value']:.1%}",
            _range(accuracy),
            str(row["problems"]),
            f"{row['tokens'] / row['problems']:,.0f}",
            f"{row['scored_tokens'] / row['problems']:,.0f}" if row["scored_tokens"] else "",
            paired,
        )
    return table


def show_run(report: Mapping[str, Any], console: Console) -> None:
    """Print the closing table: one line a round."""
    table = Table(title=f"Run {report['run']}", title_justify="left")
    columns = ("round", "coverage", "greedy", "95 %", "majority", "PPM best", "pairs", "tokens", *STAGES)
    for column in columns:
        table.add_column(column, justify="right")
    for entry in report["rounds"]:
        rows = {row["method"]: row for row in entry.get("evaluation", {}).get("rows", [])}
        greedy = rows.get("greedy", {}).get("accuracy")
        search, ppm = entry.get("search"), entry.get("ppm", {})
        accuracy = ppm.get("metrics", {}).get("pair_accuracy")
        table.add_row(
            "base" if entry["round"] == 0 else str(entry["round"]),
            f"{search['solved'] / search['problems']:.1%}" if search else "",
            f"{greedy['value']:.1%}" if greedy else "",
            _range(greedy) if greedy else "",
            _accuracy(rows, "majority"),
            _accuracy(rows, "PPM best-of"),
            f"{accuracy:.1%}" if accuracy is not None else "",
            f"{search['sampled_tokens']:,}" if search else "",
            *(duration(entry["seconds"][stage]) if stage in entry["seconds"] else "" for stage in STAGES),
        )
    console.print(table)
    console.print(
        "coverage: training problems solved by search; greedy, majority, PPM best: held-out problems; pairs: accuracy "
        "of the PPM on held-out step pairs; tokens: sampled by the search; then the time of each stage."
    )


def _range(accuracy: Mapping[str, float]) -> str:
    return f"{accuracy['low']:.1%}-{accuracy['high']:.1%}"


def _accuracy(rows: Mapping[str, Any], beginning: str) -> str:
    return next((f"{row['accuracy']['value']:.1%}" for name, row in rows.items() if name.startswith(beginning)), "")


class Metrics:
    """Metrics of a run: always appended to `metrics.jsonl`, and sent to W&B unless that is disabled.

    One W&B run a round, under one group; its id is derived from the run directory's own, so that a continued round
    goes on in the same W&B run. Without a key, or where W&B cannot be reached or refuses the key, it writes offline
    files into the run directory. Whatever else befalls W&B, whose core is a process that can die, ends no run.

    Stages log before the manifest names them. Of one that was killed in between a line is there twice; the last counts.
    """

    def __init__(self, run: RunDirectory, config: EvolveConfig, tell: Callable[[str], object]) -> None:
        """`tell` shows a line to the user."""
        self._run, self._config, self._tell = run, config, tell
        self._lines = Lines(run.metrics)
        self._wandb = workshop(run.path) / "wandb"
        self._open: dict[int, Any] = {}
        self._refused = False
        self._lost = False
        """W&B gets nothing more."""

    def log(self, round_: int, values: Mapping[str, Any], **digests: str) -> None:
        """Record numbers of a round under their slash-separated names."""
        line = {"time": round(time.time(), 3), "round": round_, **values, **digests}
        self._lines.add(json.dumps(line))
        self._lines.publish()
        if self._config.wandb.mode is WandbMode.disabled or self._lost:
            return
        self._try(lambda: self._send(round_, values, digests))
        mirror(self._wandb, self._run.path / "wandb")

    def _send(self, round_: int, values: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        if round_ not in self._open:
            self._open[round_] = self._wandb_run(round_)
        self._open[round_].config.update(digests, allow_val_change=True)
        self._open[round_].log(dict(values))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # W&B has no type for what follows its core's death
            if not self._lost:
                self._lost = True
                self._tell(f"note: W&B failed ({type(error).__name__}); metrics go to {self._run.metrics} alone")

    def _wandb_run(self, round_: int) -> Any:
        import wandb

        mode = self._config.wandb.mode
        chosen = ("online" if wandb_key() else "offline") if mode is WandbMode.auto else mode.value
        if chosen == "online" and not self._refused:
            try:
                return self._begin(round_, chosen)
            except (wandb.Error, OSError) as error:  # its message could hold an address with a password
                self._refused = True
                self._tell(
                    f"note: W&B did not begin ({type(error).__name__}); metrics go to offline files from here on: "
                    f"wandb sync {self._run.path}/wandb/offline-run-*"
                )
        return self._begin(round_, "offline")

    def _begin(self, round_: int, mode: Any) -> Any:
        """The W&B run of a round."""
        import wandb

        name = self._config.run.name
        identity = hashlib.sha256(f"{self._run.path.resolve()}".encode()).hexdigest()[:8]
        settings: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(self._config)))
        return wandb.init(
            project=self._config.wandb.project,
            entity=self._config.wandb.entity,
            group=f"{name}-{identity}",
            name=f"{name} round {round_}",
            id=f"{identity}-round-{round_}",
            resume="allow",
            mode=mode,
            dir=str(self._wandb.parent),
            config=settings | {"round": round_},
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, finish_timeout=FINISH_S),
        )

    def close(self) -> None:
        """Finish the W&B runs, each within `FINISH_S`; what was not uploaded by then stays in its files."""
        for run in self._open.values():
            self._try(run.finish)
        self._open.clear()
        if self._lost:
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()  # else it tries at the exit, and prints its traceback there
        mirror(self._wandb, self._run.path / "wandb")


def wandb_key() -> bool:
    """Whether there is a W&B key, in the environment or in ~/.netrc."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
