"""A reduced form of every benchmark, so that none rots. Goals are not checked here: tests share their machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engine, memory, overhead, saturation
from benchmarks.common import Goal, finish, machine_seconds, parser
from evolve.policy.simulated import SimulatedPolicy, sum_problems
from evolve.schema import EngineConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("ray_cluster")
def test_overhead_counts_the_cpu_time_of_every_process() -> None:
    record = overhead.measure(trees=8, rollouts=1, supervisors=1)
    assert record["stubbed_candidates"] > record["sandboxed_candidates"] > 50
    assert {"Shard", "ServiceHost", "driver"} <= set(record["stubbed_parts"])
    assert record["sandboxed_ms_per_candidate"] > record["sandboxed_parts"].get("sandbox", 0.0) > 0


def test_the_cpu_time_of_a_child_that_nobody_waited_for_is_counted() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    code = f"""
import signal, subprocess, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
subprocess.call([sys.executable, "-c", {burn!r}])
"""
    before = machine_seconds()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert machine_seconds() - before >= 0.5


@pytest.mark.usefixtures("ray_cluster")
def test_saturation_grows_the_same_trees_under_both_schedules() -> None:
    record = saturation.measure(trees=4, slots=16, speed=50.0, rollouts=1, at_once=3)
    assert 0 < record["lockstep_busy"] <= 1
    assert 0 < record["busy"] <= 1


def test_busy_shares_by_hand() -> None:
    # Two slots: both busy for 10 s, one for 10 s, nothing after that.
    timeline = [(0.0, 0.0), (10.0, 20.0), (20.0, 30.0), (50.0, 30.0)]
    assert saturation.busy_share(timeline, 2, 0.0, 0.5) == pytest.approx(1.0)
    assert saturation.busy_share(timeline, 2, 0.5, 1.0) == pytest.approx(0.5)
    assert saturation.busy_share(timeline, 2, 0.25, 0.75) == pytest.approx(0.75)


@pytest.mark.usefixtures("ray_cluster")
def test_memory_is_read_while_trees_come_in() -> None:
    record = memory.measure(trees=300, at_once=16)
    assert record["trees"] == 300
    assert record["part_files"] >= 3
    assert record["shard_growth"] >= 1.0
    assert record["driver_growth"] >= 1.0


@pytest.mark.usefixtures("ray_cluster")
def test_engine_asks_all_at_once_for_just_what_the_search_asked_for() -> None:
    """With the simulated engine in vLLM's place: what is asked for and counted is the same."""
    made = engine.measure(Simulated(), ("any", "any"), sum_problems(3, 2), core=0, rollouts=2)
    assert made["requests"] > 3
    assert made["search_tokens"] == made["all_at_once_tokens"]
    assert made["search_over_all_at_once"] > 0


class Simulated:
    """Makes a simulated engine; a class of the package's, so that its actor can find it."""

    def __call__(self) -> SimulatedPolicy:
        return SimulatedPolicy("any", EngineConfig(max_num_seqs=32), speed=10.0)


def test_scaling_runs_on_pretended_nodes() -> None:
    code = (
        "from benchmarks import scaling\n"
        "record = scaling.measure([1, 2], trees_a_shard=1, full_trees=1, full_speed=50.0)\n"
        "assert [row['trees'] for row in record['rows']] == [1, 2], record\n"
        "assert 0 < record['speed'] <= 50, record\n"
        "print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


def test_check_exits_1_when_a_goal_is_missed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    goals = [Goal("ratio", "at least", 0.9), Goal("cost", "at most", 8.0)]
    checked = parser("any", "").parse_args(["--check", "--json", str(tmp_path / "record.json")])
    assert finish({"ratio": 0.95, "cost": 7.0}, goals, checked) == 0
    assert finish({"ratio": 0.95, "cost": 9.0}, goals, checked) == 1
    assert "MISSED" in capsys.readouterr().out.splitlines()[-1]
    assert finish({"ratio": 0.5, "cost": 9.0}, goals, parser("any", "").parse_args([])) == 0
    assert '"ratio": 0.95' in (tmp_path / "record.json").read_text()
