"""What vLLM's worker process does for us, without vLLM and with it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

WORKER = """
import sys, time
from evolve.policy.worker import WorkerExtension

WorkerExtension().end_with(int(sys.argv[1]), float(sys.argv[2]))
print("ready", flush=True)
time.sleep(120)
"""


MIDDLE = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
print(worker.pid, flush=True)
time.sleep(120)
"""


def worker(owner: int, started: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(owner), str(started)], stdout=subprocess.PIPE, text=True)


def test_an_engine_core_ends_when_its_owner_was_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    core = worker(owner.pid, psutil.Process(owner.pid).create_time())
    assert core.stdout is not None
    assert core.stdout.readline() == "ready\n"
    time.sleep(1.5)
    assert core.poll() is None, "its owner lives"
    owner.kill()
    owner.wait()
    assert core.wait(30) == 70


def test_a_later_process_with_the_owners_number_is_not_its_owner() -> None:
    core = worker(psutil.Process().pid, 1.0)
    assert core.wait(30) == 70


def test_a_core_between_a_worker_and_the_owner_ends_with_them() -> None:
    """The owner is a process whose child, the core, has the worker as a child."""
    owner_code = (
        "import os, psutil, subprocess, sys, time\n"
        "own = [str(os.getpid()), str(psutil.Process().create_time())]\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[1:], *own])\n"
        "time.sleep(120)"
    )
    owner = subprocess.Popen([sys.executable, "-c", owner_code, MIDDLE, WORKER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline().strip().isdecimal()
    assert owner.stdout.readline() == "ready\n"
    below = psutil.Process(owner.pid).children(recursive=True)
    assert len(below) == 2
    owner.kill()
    owner.wait()
    assert psutil.wait_procs(below, timeout=30)[1] == []


OWN_CORE = """
import asyncio, os, sys
import psutil

from evolve.policy import serving
from evolve.policy.engine import PolicyEngine
from evolve.schema import EngineConfig, Precision


def with_a_core_of_its_own(config, device):
    prepare(config, device)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"


async def main():
    config = EngineConfig(precision=Precision.fp32, max_num_seqs=8, max_model_len=256, cpu_kv_cache_gib=0.25)
    await PolicyEngine(sys.argv[1], config).start()
    print("up", *(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    prepare, serving.prepare_environment = serving.prepare_environment, with_a_core_of_its_own
    asyncio.run(main())
"""


def test_vllms_processes_end_when_the_engines_owner_was_killed(
    tmp_path: Path, build_tiny_model: Callable[..., str]
) -> None:
    """As on GPUs: the engine core, and here its worker too, are processes of their own."""
    script = tmp_path / "own_core.py"
    script.write_text(OWN_CORE)
    command = [sys.executable, str(script), build_tiny_model(tmp_path / "model", 0)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert owner.stdout is not None
    said = next(line for line in owner.stdout if line.startswith("up"))
    below = [psutil.Process(int(pid)) for pid in said.split()[1:]]
    assert any("EngineCore" in " ".join(process.cmdline()) for process in below)
    owner.kill()
    owner.wait()
    assert psutil.wait_procs(below, timeout=30)[1] == []
