"""The first signal ends a run in good order; a second one, of either kind, at once; a dead Ray does, too."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import time
from evolve.stages.ending import obey_signals

obey_signals()

def wait():
    # Not in one sleep: a signal that comes just before it would be looked at after it.
    for _ in range(2400):
        time.sleep(0.05)

try:
    print("working", flush=True)
    wait()
except KeyboardInterrupt:
    print("ending", flush=True)
    wait()
"""


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(("first", "second"), [(INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_signal_ends_what_the_first_one_began_to_end(first: signal.Signals, second: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(first)
    assert process.stdout.readline() == "ending\n"
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(30) == 128 + second
    assert process.stderr is not None
    assert "once more to stop at once" in process.stderr.read()


WITH_RAY = """
import sys, time
from pathlib import Path

import ray

from evolve import cluster
from evolve.schema import ClusterConfig
from evolve.stages import ending
from evolve.stages.ending import Lifeline, obey_signals

cluster.connect(ClusterConfig(address=sys.argv[2] if len(sys.argv) > 2 else None))
obey_signals()
ending.HEAD_LOOK_S = 0.2
Lifeline(Path(sys.argv[1]).touch, lambda: "all of it is safe")
ray.get(ray.remote(num_cpus=0)(lambda: None).remote())  # by now Ray has nothing to ask its head by itself
print("working", flush=True)

def call_what_is_gone():
    # Not before: Ray aborts a process whose question is under way when its head shuts down in good order.
    while not (cluster.dead_daemons() or cluster.joined_head()):
        time.sleep(0.01)
    while True:
        ray.nodes()

try:
    call_what_is_gone()
except KeyboardInterrupt:
    call_what_is_gone()  # as the end of a run does, that gives back what it has
"""


@pytest.mark.parametrize("whole", [True, False], ids=["told with it", "dead by itself"])
def test_a_run_ends_with_the_ray_it_has_started(whole: bool, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_RAY, str(tmp_path / "released")],
        cwd=root, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "working\n"
    daemons = psutil.Process(process.pid).children(recursive=True)
    if whole:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        [gcs] = [daemon for daemon in daemons if "gcs_server" in daemon.name()]
        gcs.kill()
    # A call to a Ray that is gone already keeps Python from hearing of the signal.
    expected = {1, 128 + signal.SIGTERM} if whole else {1}
    assert process.wait(45) in expected, "Ray itself gives up after a minute"
    assert (tmp_path / "released").exists()
    said = process.stderr.read()
    assert "stopped: Ray's " in said
    assert "all of it is safe" in said
    assert psutil.wait_procs(daemons, timeout=30)[1] == []


ANOTHERS_RAY = """
import time

import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(600)
"""


def test_a_run_ends_with_the_head_it_has_joined(tmp_path: Path) -> None:
    """As when a Slurm job is cancelled: Ray is no child of the driver there."""
    root = Path(__file__).parents[2]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled"
    }
    head = subprocess.Popen(
        [sys.executable, "-c", ANOTHERS_RAY], cwd=root, env=own, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        process = subprocess.Popen(
            [sys.executable, "-c", WITH_RAY, str(tmp_path / "released"), address],
            cwd=root, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "working\n"
        os.killpg(head.pid, signal.SIGKILL)
        assert process.wait(45) == 1, "Ray itself gives up after a minute"
        assert (tmp_path / "released").exists()
        said = process.stderr.read()
        assert f"stopped: Ray's head at {address} ended" in said
        assert "all of it is safe" in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)


SPOILED = """
import sys, time

from evolve import cluster
from evolve.stages import ending
from evolve.store.run import RunError

def safe():
    raise RunError("manifest.json is not readable")

def last_act():
    print("given back", file=sys.stderr, flush=True)
    raise OSError("stale file handle")

ending.LOOK_S = 0.05
cluster.dead_daemons = lambda: ["raylet"]
ending.Lifeline(last_act, safe)
time.sleep(60)
"""


def test_a_run_ends_with_its_ray_whatever_becomes_of_its_last_acts() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SPOILED], cwd=root, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "stopped: Ray's raylet ended, which this run needs", "manifest.json is not readable", "given back",
        "stale file handle",
    ]  # fmt: skip
