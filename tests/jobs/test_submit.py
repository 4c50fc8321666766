"""The documented command for real: `ray start --head` with a token, then `ray job submit --working-dir .`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.outcome import damage
from benchmarks.chaos.recipe import ONE_A_NODE, SCRIPTED_ROUND
from benchmarks.chaos.run import OURS, title
from evolve.policy.checkpoint import digest
from evolve.store.parts import mended_parts
from evolve.store.run import RunDirectory

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120.0
"""A bound for a busy machine; on an idle one a head is up in about 5 s."""
CPUS = 3
"""Not what any machine here has, so that the plan shows which cluster it was made for."""
RUN_S = 400.0
"""A bound for a whole small run on a busy machine; on two idle cores it takes about a minute."""


def free_ports(count: int) -> list[int]:
    """Ports that are free together."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [own.getsockname()[1] for own in sockets]


@dataclass(frozen=True)
class Head:
    """A running head: its job API, and the environment of one who may use it."""

    jobs: str
    gcs: str
    """Where other nodes join."""
    environment: dict[str, str]
    directory: Path

    def submit(self, *entrypoint: str, timeout_s: float = START_S, **changed: str) -> tuple[int, str]:
        """Exit status and output of `ray job submit --working-dir . -- ENTRYPOINT`."""
        return self.job("submit", "--working-dir", ".", "--", *entrypoint, timeout_s=timeout_s, **changed)

    def job(self, *arguments: str, timeout_s: float = START_S, **changed: str) -> tuple[int, str]:
        """Exit status and output of `ray job ARGUMENTS`."""
        done = subprocess.run(
            [BIN / "ray", "job", *arguments],
            cwd=ROOT,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.jobs, **changed},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
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
    found = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, directory)
    try:
        wait_for_jobs(found, process, directory / "log")
        yield found
    finally:
        switch_off(process)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def nodes(head: Head) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two more raylets, each with a pretended GPU, joined as on other machines.

    Each has a directory of its own, as machines have: else one that unpacks the job's files removes another's.
    """
    started = []
    with ExitStack() as stack:
        for number in range(2):
            agent, agent_grpc, metrics = free_ports(3)
            process = subprocess.Popen(
                [
                    *(BIN / "ray", "start", f"--address={head.gcs}", "--block", "--node-ip-address=127.0.0.1"),
                    *(f"--num-cpus={CPUS}", "--num-gpus=1", "--object-store-memory=100000000"),
                    *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
                    *(f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"),
                    f"--temp-dir={head.directory / f'node{number}'}",
                ],
                env=head.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(switch_off, process)
            started.append(process)
        yield started


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


def switch_off(process: subprocess.Popen[bytes]) -> None:
    """End a node at once, with all that is on it and nothing else."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for own in below:
        with suppress(psutil.NoSuchProcess):
            own.kill()
    process.wait()


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


def test_a_round_that_was_stopped_leaves_nothing_at_work_and_goes_on_over_two_nodes(head, nodes):
    """Engines are scripted and hold the pretended GPUs; search, sandboxes, training and evaluation are real."""
    recipe = (*SCRIPTED_ROUND, *ONE_A_NODE, "cluster.shards=2", "run.name=sent")
    drive = ("python", "-m", "benchmarks.chaos", "--drive", "benchmarks.scripted:engines", *recipe)
    run = RunDirectory(Path(head.environment["EVOLVE_RUNS"]) / "sent")
    status, output = head.job("submit", "--no-wait", "--submission-id", "first", "--working-dir", ".", "--", *drive)
    assert status == 0, output
    until(lambda: run.round(1).trees.exists(), "the first job searches", lambda: head.job("logs", "first")[1])
    status, output = head.job("stop", "first")
    assert status == 0, output
    until(lambda: not at_work(nodes), "nothing is at work", lambda: str(at_work(nodes)))
    assert run.round(1).finished("search") is None

    status, output = head.submit(*drive, timeout_s=RUN_S)
    assert status == 0, output[-6000:]
    assert "succeeded" in output
    assert "Traceback" not in output
    places = set(re.findall(r"shard-\d+ is at work on node (\w+)", output))
    assert len(places) == 2, output[-6000:]
    manifest = run.round(1).manifest()
    assert set(manifest) == {"search", "rows", "sft", "ppm", "evaluation"}
    assert mended_parts(run.round(1).trees).count == manifest["search"]["trees"] >= 30
    for stage in ("sft", "ppm"):
        assert digest(run.round(1).path / stage / "checkpoint") == manifest[stage]["digest"]
    assert damage(run.path) == []
    until(lambda: not at_work(nodes), "nothing is at work", lambda: str(at_work(nodes)))


def at_work(nodes: list[subprocess.Popen[bytes]]) -> list[str]:
    """Titles of the processes of a run on these nodes."""
    below = [process for node in nodes for process in psutil.Process(node.pid).children(recursive=True)]
    return [found for process in below if any(own in (found := title(process)) for own in OURS)]


def until(true: Callable[[], bool], what: str, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not after {START_S:.0f} s. {explain()[-3000:]}"
        time.sleep(0.2)
