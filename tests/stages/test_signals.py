"""The first signal ends a run in good order; a second one, of either kind, at once; a dead Ray does, too."""

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
from evolve.stages.ending import Lifeline, obey_signals

cluster.connect(ClusterConfig())
obey_signals()
Lifeline(Path(sys.argv[1]).touch, lambda: "all of it is safe")
print("working", flush=True)
try:
    while True:
        ray.nodes()
except KeyboardInterrupt:
    while True:  # as the end of a run does, that gives back what it has
        ray.nodes()
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
    assert process.wait(45) == (128 + signal.SIGTERM if whole else 1), "Ray itself gives up after a minute"
    assert (tmp_path / "released").exists()
    said = process.stderr.read()
    assert "gcs_server" in said
    assert "all of it is safe" in said
    assert psutil.wait_procs(daemons, timeout=30)[1] == []
