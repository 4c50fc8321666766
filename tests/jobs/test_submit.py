"""The documented command for real: `ray start --head` with a token, then `ray job submit --working-dir .`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120.0
"""A bound for a busy machine; on an idle one a head is up in about 5 s."""
CPUS = 3
"""Not what any machine here has, so that the plan shows which cluster it was made for."""


def free_ports(count: int) -> list[int]:
    """Ports that are free together."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [own.getsockname()[1] for own in sockets]


@dataclass(frozen=True)
class Head:
    """A running head: its job API, and the environment of one who may use it."""

    jobs: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str, **changed: str) -> tuple[int, str]:
        """Exit status and output of `ray job submit --working-dir . -- ENTRYPOINT`."""
        done = subprocess.run(
            [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *entrypoint],
            cwd=ROOT,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.jobs, **changed},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_S,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with token authentication, apart from any other Ray of this machine; ended process by process."""
    # Ray puts sockets there, whose paths may have 107 characters only: pytest's own directories are too deep.
    directory = Path(tempfile.mkdtemp(prefix="evolve-"))
    token = directory / "token"
    token.write_text("0123456789abcdef" * 4)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EVOLVE_"))}
    environment = own | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "EVOLVE_RUNS": str(directory / "runs"),
    }
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    process = subprocess.Popen(
        [
            *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
            *(f"--num-cpus={CPUS}", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"),
            *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--metrics-export-port={metrics}", f"--temp-dir={directory / 'ray'}"),
        ],
        env=environment,
        stdout=(directory / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    found = Head(f"http://127.0.0.1:{dashboard}", environment)
    try:
        wait_for_jobs(found, process, directory / "log")
        yield found
    finally:
        end(process)
        shutil.rmtree(directory, ignore_errors=True)


def wait_for_jobs(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the job API answers; without a token it answers by refusing."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{head.jobs}/api/jobs/", timeout=5).close()
        except urllib.error.HTTPError as refused:
            if refused.code != 401:
                raise
            return
        except OSError:
            pass
        else:
            pytest.fail("the job API answers without a token")
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no job API after {START_S:.0f} s: {log.read_text()}"
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    """End `ray start --block` and, should one be left, the processes it started; none but those."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(below, timeout=10)
    for left in alive:
        left.kill()


def test_the_plan_is_made_for_the_cluster_that_the_job_runs_in(head):
    status, output = head.submit("python", "-m", "evolve.driver", "conf=smoke", "--plan")
    assert status == 0, output
    assert f"this cluster: 1 node, {CPUS} CPUs, 0 GPUs" in output
    assert "by node" in output
    assert "succeeded" in output
    assert "Token authentication is" not in output
    assert "Traceback" not in output


def test_a_job_runs_the_code_that_was_sent_and_little_else_is_sent(head):
    code = (
        "import evolve.driver, os, pathlib; "
        "size = sum(p.stat().st_size for p in pathlib.Path('.').rglob('*')); "
        "print('sent', size, evolve.driver.__file__, sorted(os.listdir('.')))"
    )
    status, output = head.submit("python", "-c", code)
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("sent ")]
    _, size, driver, listed = line.split(maxsplit=3)
    assert "/working_dir_files/" in driver
    names = {name.strip("'") for name in listed.strip("[]").split(", ")}
    assert {"conf", "pyproject.toml"} <= names
    assert not {".venv", ".git", "runs", "wandb", ".mypy_cache"} & names
    assert int(size) < 10e6


def test_a_run_that_would_be_lost_with_the_job_is_refused(head):
    status, output = head.submit("env", "-u", "EVOLVE_RUNS", "python", "-m", "evolve.driver", "conf=smoke", "--plan")
    assert status != 0
    assert "run.dir" in output
    assert "/shared/runs" in output


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_who_has_no_token_is_refused(head, tmp_path, mode):
    wrong = tmp_path / "token"
    wrong.write_text("f" * 64)
    status, output = head.submit("true", RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert status != 0
    assert "auth" in output.lower()
