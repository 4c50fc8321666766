"""`--plan` as a user reads it: tables of at most 100 columns, the arithmetic and every assumption."""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evolve.attach import address_of, attached
from evolve.config import to_yaml
from evolve.estimate import Plan, plan
from evolve.placement import Layout, Node, Resources, Share, amount, listed, local_resources
from evolve.schema import ClusterConfig, EvolveConfig

WIDTH = 100
NAMES = 4
"""Names of nodes shown on one line."""


def show_plan(config: EvolveConfig) -> None:
    """Print the plan of a configuration for the Ray cluster it would run in, else for this machine.

    Raises:
        UnreachableError: a Ray address is set and no cluster answers there.
    """
    address = address_of(config.cluster)
    resources = local_resources() if address is None else cluster_resources(config.cluster, address)
    sys.stdout.write(render(plan(config, resources)))


def cluster_resources(config: ClusterConfig, address: str) -> Resources:
    """The nodes of a running Ray cluster; nothing is started on them.

    Raises:
        UnreachableError: no cluster answers there.
    """
    with attached(address) as nodes:
        from evolve.cluster import may_grow

        found = tuple(Node(node.cpus, node.gpus, node.name) for node in nodes())
        return Resources(found, may_grow(config))


def render(found: Plan) -> str:
    """The whole plan as plain text: configuration, placement, rounds, arithmetic, what is missing."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None)
    config = found.config
    console.rule("configuration, as resolved")
    console.print(Text(to_yaml(config).rstrip()))
    console.rule(f"plan of {config.run.name}: nothing is started")
    nodes, cpus, gpus = len(found.resources.nodes), found.resources.cpus, found.resources.gpus
    console.print(f"this cluster: {_plural(nodes, 'node')}, {cpus:g} CPUs, {_plural(gpus, 'GPU')}")
    console.print(_placement(found))
    console.print(_by_node(found))
    console.print(_work(found))
    console.print(_cost(found))
    _total(console, found)
    console.rule("arithmetic")
    for estimate in found.rounds:
        console.print(f"round {estimate.plan.round}")
        for line in estimate.arithmetic:
            _bullet(console, line)
    console.rule("assumptions")
    for line in found.assumptions:
        _bullet(console, line)
    console.rule("missing on this cluster")
    waits = [f"waits for nodes that may be added: {line}" for line in found.waits]
    for line in [*found.missing, *waits] or ["nothing"]:
        _bullet(console, line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}" + ("" if count == 1 else "s")


def _bullet(console: Console, line: str) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=3, justify="right")
    grid.add_column(overflow="fold")
    grid.add_row("-", Text(line))
    console.print(grid)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _placement(found: Plan) -> Table:
    table = _table(
        "placement",
        "stage",
        "policy GPUs",
        "PPM GPUs",
        "CPUs",
        "weights a GPU" if found.unit == "GPU" else "weights",
        "shards that fit",
    )
    for estimate in found.rounds:
        shard = estimate.shard
        table.add_row(
            f"{shard.stage}, a shard",
            f"{shard.policy_gpus:g}",
            f"{shard.ppm_gpus:g}",
            f"{shard.cpus:g}",
            f"{shard.weights_gib:.3g} GiB",
            str(shard.fits),
        )
    workers = "one worker a GPU" if found.trainer_workers is None else f"{found.trainer_workers} workers"
    sft, ppm = found.config.sft, found.config.ppm
    table.caption = (
        f"training: {workers}; SFT batch {sft.batch}, ZeRO-{sft.zero_stage}, {sft.precision.name}; "
        f"PPM batch {ppm.batch}, ZeRO-{ppm.zero_stage}, {ppm.precision.name}"
    )
    table.caption_justify = "left"
    return table


def _by_node(found: Plan) -> Table:
    """How many shards and trainer workers each node has room for; nodes alike share a line."""
    table = _table("by node: shards of the search, workers of the training", "node", "CPUs", "GPUs")
    for layout in found.layouts:
        table.add_column(layout.what, justify="right")
    alike: dict[tuple[str, ...], list[str]] = {}
    for index, node in enumerate(found.resources.nodes):
        cells = [_share(layout, layout.shares[index]) for layout in found.layouts]
        alike.setdefault((f"{node.cpus:g}", f"{node.gpus:g}", *cells), []).append(node.name)
    for cells_of, names in alike.items():
        table.add_row(listed(names, NAMES), *cells_of)
    needs = "; ".join(
        f"{layout.what}: {amount(layout.need)} a {'worker' if layout.what == 'training' else 'shard'}"
        for layout in found.layouts
    )
    table.caption = f"each takes, on one node: {needs}. Ray chooses among nodes with room."
    table.caption_justify = "left"
    table.columns[0].no_wrap = False
    return table


def _share(layout: Layout, share: Share) -> str:
    if share.groups or layout.complete:
        return str(share.groups or "-")
    return f"{amount(share.short)} short"


def _work(found: Plan) -> Table:
    table = _table(
        "search",
        "round",
        "model",
        "Q from",
        "problems",
        "trees",
        "at most",
        "rollouts",
        "per node",
        "sampled",
        "tokens",
    )
    table.caption = "rollouts: first trees + retries of the unsolved + their escalation, a problem"
    table.caption_justify = "left"
    for estimate in found.rounds:
        own = estimate.plan
        schedule = f"{own.trees}x{own.rollouts}"
        if own.retry_trees:
            schedule += f"+{own.retry_trees}x{own.rollouts}"
        schedule += "".join(f"+{more}" for more in own.escalation)
        table.add_row(
            str(own.round),
            estimate.model.billions,
            own.value.name,
            _count(estimate.problems),
            _count(estimate.trees),
            _count(estimate.most_trees),
            schedule,
            str(own.candidates),
            _count(estimate.candidates),
            _count(estimate.generated_tokens),
        )
    return table


def _cost(found: Plan) -> Table:
    unit = found.unit
    table = _table(
        f"cost ({unit}-hours)",
        "round",
        "search",
        "SFT",
        "PPM",
        "evaluation",
        "all",
        "trees on disk",
        "checkpoints",
    )
    for estimate in found.rounds:
        hours = estimate.hours
        table.add_row(
            str(estimate.plan.round),
            *(_hours(hours[stage]) for stage in ("search", "sft", "ppm", "evaluate")),
            _hours(sum(hours.values())),
            _bytes(estimate.tree_bytes),
            _bytes(estimate.checkpoint_bytes),
        )
    return table


def _total(console: Console, found: Plan) -> None:
    total = f"all rounds: {_hours(found.hours)} {found.unit}-hours, {_bytes(found.disk_bytes)} on disk"
    if found.unit == "GPU":
        days = [f"{gpus} GPUs: {found.hours / gpus / 24:,.1f} days" for gpus in (8, 64, 256)]
        total += "; with all of them busy, " + ", ".join(days)
    console.print(Text("\n" + total))


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"
