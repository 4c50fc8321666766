"""`python -m evolve.doctor [conf=NAME] [key=value ...] [--nodes N] [--timeout S] [--json FILE]`

Looks for what would make a run fail, before it is started, and says how to mend it: here, or, where a Ray address is
given (`cluster.address=` or RAY_ADDRESS), on every node of that cluster. Takes the arguments of `evolve.driver`, since
the run directory, the disk needed and the placement depend on them. Exit status: 0; 1 when a check fails; 2 when the
arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evolve.attach import UnreachableError, address_of, attached
from evolve.config import ConfigError, load
from evolve.doctor import checks, local, nodes, show
from evolve.doctor.checks import Check, Status, Wanted
from evolve.doctor.facts import ROOT, Probe
from evolve.estimate import plan
from evolve.files import Place
from evolve.placement import Node, Resources, local_resources
from evolve.schema import EvolveConfig
from evolve.store.run import RunDirectory

ASK_S = 300.0
"""How long a node may take to answer: it imports torch and tests its sandbox."""


def main(argv: Sequence[str]) -> int:
    """Run the checks and print them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evolve.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="how many nodes the cluster must have")
    parser.add_argument("--timeout", type=float, default=ASK_S, metavar="S", help="seconds to wait for them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks there, too")
    options, rest = parser.parse_known_args(argv)
    try:
        config = load(rest)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    address = address_of(config.cluster)
    if address is None:
        found = examine_machine(config)
    else:
        try:
            found = examine_cluster(config, address, options.nodes, options.timeout)
        except UnreachableError as error:
            found = [Check("cluster", address, Status.FAIL, str(error), "see above; `ray status` must answer first")]
    show.table(found)
    if options.json is not None:
        show.write(found, options.json)
    return 1 if checks.failed(found) else 0


def examine_machine(config: EvolveConfig) -> list[Check]:
    """All checks of this machine, as a run without a cluster would meet it."""
    run_dir = _run_dir(config)
    print("looking at this machine (about 10 s) ...", file=sys.stderr)
    one = Probe().facts("this machine", str(run_dir))
    resources = local_resources()
    estimate = plan(config, resources)
    return [
        *checks.versions([one], Wanted.read(ROOT)),
        *checks.of_node(one, estimate.disk_bytes, 0.0, _utilization(config)),
        *local.ports(),
        *nodes.same_directory(None, run_dir),
        local.wandb(config.wandb),
        *local.placement(estimate.missing, estimate.waits),
    ]


def examine_cluster(config: EvolveConfig, address: str, expected: int | None, timeout_s: float) -> list[Check]:
    """All checks of a running cluster, on every node.

    Raises:
        UnreachableError: no cluster answers.
    """
    from evolve.cluster import may_grow

    run_dir = _run_dir(config)
    with attached(address) as current:
        live = nodes.wait_for(expected or 1, current, timeout_s)
        found = [nodes.joined(live, expected, timeout_s), local.token_authentication()]
        print(f"asking {len(live)} node(s) (about 30 s) ...", file=sys.stderr)
        resources = Resources(tuple(Node(node.cpus, node.gpus, node.name) for node in live), may_grow(config.cluster))
        estimate = plan(config, resources)
        probes = nodes.Probes(live, ASK_S)
        try:
            facts = nodes.facts(probes, run_dir)
            directory = nodes.same_directory(probes, run_dir)
            ports = nodes.connections(probes)
        finally:
            probes.close()
    found += [*probes.lost, *checks.versions(facts, Wanted.read(ROOT))]
    gpus = {node.name: node.gpus for node in live}
    for one in facts:
        found += checks.of_node(one, estimate.disk_bytes, gpus[one.node], _utilization(config))
    return [*found, *directory, *ports, local.wandb(config.wandb), *local.placement(estimate.missing, estimate.waits)]


def _run_dir(config: EvolveConfig) -> Place:
    return RunDirectory.of(config.run.dir, config.run.name).path


def _utilization(config: EvolveConfig) -> float:
    return max(config.policy.engine.gpu_memory_utilization, config.ppm.engine.gpu_memory_utilization)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
