"""jobs/slurm.sbatch with stand-ins for Slurm, Ray and the two programs: order, token, signals, status, clean end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "slurm.sbatch"

# Starts the task once a node, as srun does, and ends its tasks when it is told to end.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$CALLS"; shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_PROCID=$node "$@" & tasks+=($!); done
trap 'kill "${tasks[@]}"' TERM
wait; wait
"""
RAY = """#!/usr/bin/env bash
echo "ray $*" >> "$CALLS"
[[ $* != *--head* ]] || exec "$PYTHON" -c 'import re, socket, sys, time
port = re.search("--port=([0-9]+)", sys.argv[1])[1]
listener = socket.create_server(("127.0.0.1", int(port))); time.sleep(60)' "$*"
exec sleep 60
"""
# -c is the token and the address of this node; -m the doctor and the driver.
PROGRAM = """#!/usr/bin/env bash
if [[ $1 == -c && $2 == *get_node_ip_address* ]]; then echo 127.0.0.1; exit; fi
if [[ $1 == -c ]]; then exec "$PYTHON" "$@"; fi
echo "$* mode=$RAY_AUTH_MODE address=$RAY_ADDRESS runs=$EVOLVE_RUNS" >> "$CALLS"
stat -c 'token %a %s' "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"
if [[ $2 == evolve.doctor ]]; then  # which waits for all nodes
  for ((i = 0; i < 300; i++)); do grep -q "^ray start --block --address" "$CALLS" && break; sleep 0.1; done
  exit "${DOCTOR:-0}"
fi
trap 'echo "driver told to end" >> "$CALLS"; sleep 0.3; exit 130' TERM
if [[ ${DRIVER:-0} == wait ]]; then for ((i = 0; i < 300; i++)); do sleep 0.1; done; fi
exit "${DRIVER:-0}"
"""


def free(port: int) -> bool:
    """Whether the head may have this port, which the script derives from the job's number."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class Job:
    """A checkout with stand-ins, and a running job script."""

    def __init__(self, directory: Path, **environment: str) -> None:
        programs = directory / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, text in (("srun", SRUN), ("ray", RAY), ("python", PROGRAM)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.directory, self.calls = directory, directory / "calls"
        self.number = next(number for number in range(100, 5000) if free(20000 + number * 2))
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EVOLVE_", "SLURM_"))}
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "conf=smoke", "round=1"],
            env={
                **own,
                "SLURM_SUBMIT_DIR": str(directory),
                "SLURM_JOB_ID": str(self.number),
                "SLURM_NNODES": "2",
                "CALLS": str(self.calls),
                "PYTHON": sys.executable,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.children: list[psutil.Process] = []

    def end(self, timeout_s: float = 60) -> int:
        self.process.communicate(timeout=timeout_s)
        return self.process.returncode

    def said(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.said()):
            assert time.monotonic() < deadline, f"no {text!r} in {self.said()}"
            time.sleep(0.05)
        self.children = psutil.Process(self.process.pid).children(recursive=True)


def test_it_is_shell():
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=10)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_slurm_accepts_it():
    done = subprocess.run(["sbatch", "--test-only", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert "Unable to open file" not in done.stderr
    assert "nvalid option" not in done.stderr


def test_its_ray_start_options_exist():
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    used = re.findall(r"--[a-z-]+", " ".join(re.findall(r"ray start (?:.|\\\n)*?(?=\n)", SCRIPT.read_text())))
    assert "--block" in used
    assert set(used) <= known


def test_head_and_workers_start_then_the_doctor_then_the_driver(tmp_path):
    job = Job(tmp_path)
    assert job.end() == 0
    said = job.said()
    (head,) = [line for line in said if line.startswith("ray start --head --block")]
    assert any(line.startswith("ray start --block --address=127.0.0.1:") for line in said)
    assert "srun --nodes=2" in said
    doctor, driver = (
        next(i for i, line in enumerate(said) if f"evolve.{name}" in line) for name in ("doctor", "driver")
    )
    assert said.index(head) < doctor < driver
    assert said[doctor].startswith("-m evolve.doctor --nodes 2 conf=smoke round=1 mode=token address=127.0.0.1:")
    assert said[driver].startswith("-m evolve.driver conf=smoke round=1 mode=token")
    assert f"runs={tmp_path / 'runs'}" in said[driver]


def test_the_token_is_the_jobs_own_readable_by_its_user_alone_and_gone_at_the_end(tmp_path):
    job = Job(tmp_path)
    assert job.end() == 0
    assert "token 600 64" in job.said()
    assert not list(tmp_path.glob(".ray-token-*"))


@pytest.mark.parametrize(("programs", "status"), [({"DRIVER": "3"}, 3), ({"DOCTOR": "1"}, 1)])
def test_its_status_is_that_of_what_failed(tmp_path, programs, status):
    job = Job(tmp_path, **programs)
    assert job.end() == status
    assert any("evolve.driver" in line for line in job.said()) == ("DRIVER" in programs)


def test_before_its_time_is_up_the_driver_ends_in_good_order_and_no_process_is_left(tmp_path):
    job = Job(tmp_path, DRIVER="wait")
    job.wait_for("-m evolve.driver")
    job.process.send_signal(signal.SIGTERM)  # what --signal=B:TERM@300 sends
    assert job.end() == 130
    assert "driver told to end" in job.said()
    gone, alive = psutil.wait_procs(job.children, timeout=20)
    assert gone
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
