"""The first signal ends a run in good order; a second one, of either kind, at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import signal, time
from evolve.stages.run import _SIGNALS, _stop

for number in _SIGNALS:
    signal.signal(number, _stop)

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
