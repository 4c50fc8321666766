"""What vLLM's worker process does for us, without vLLM."""

import subprocess
import sys
import time

import psutil

WORKER = """
import sys, time
from evolve.policy.worker import WorkerExtension

WorkerExtension().end_with(int(sys.argv[1]), float(sys.argv[2]))
print("ready", flush=True)
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
