"""The smoke recipe from nothing to an improved model, by the command that users type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parents[2]


def drive(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    return subprocess.run(
        [sys.executable, "-m", "evolve.driver", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run."""
    directory = tmp_path_factory.mktemp("runs")
    done = drive("conf=smoke", f"run.dir={directory}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return directory / "smoke"


def report(run: Path) -> dict[int, dict]:
    return {entry["round"]: entry for entry in json.loads((run / "report.json").read_text())["rounds"]}


def accuracy(entry: dict, method: str) -> float:
    return next(row["accuracy"]["value"] for row in entry["evaluation"]["rows"] if row["method"].startswith(method))


def test_round_one_improves_greedy_pass_at_1_by_ten_points(run: Path) -> None:
    rounds = report(run)
    assert accuracy(rounds[1], "greedy") >= accuracy(rounds[0], "greedy") + 0.10


def test_every_round_reports_every_method_with_its_tokens(run: Path) -> None:
    rounds = report(run)
    assert set(rounds) == {0, 1, 2}
    for number in (1, 2):
        methods = {row["method"].split("@")[0].split(" best-of")[0] for row in rounds[number]["evaluation"]["rows"]}
        assert methods >= {"greedy", "pass", "majority", "log-probability", "PPM", "PPM beam"}
        assert all(row["tokens"] > 0 for row in rounds[number]["evaluation"]["rows"])
        assert set(rounds[number]["seconds"]) == {"search", "sft", "ppm", "evaluation"}
        assert 0 <= rounds[number]["ppm"]["metrics"]["pair_accuracy"] <= 1


def test_trees_are_durable_whole_and_counted(run: Path) -> None:
    for number in (1, 2):
        tables = [pq.read_table(path) for path in (run / f"round-{number}" / "trees").glob("*.parquet")]
        roots = [
            key
            for t in tables
            for key in t.filter(t["node"].to_numpy() == 0).select(["problem_id", "tree"]).to_pylist()
        ]
        keys = {(root["problem_id"], root["tree"]) for root in roots}
        assert len(keys) == len(roots) == report(run)[number]["search"]["trees"]


def test_the_checkpoints_of_all_rounds_load_with_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for number in (1, 2):
        for stage in ("sft", "ppm"):
            path = run / f"round-{number}" / stage / "checkpoint"
            assert AutoModelForCausalLM.from_pretrained(path).num_parameters() > 0
            assert AutoTokenizer.from_pretrained(path).encode("1 + 1")


def test_metrics_are_json_lines_and_wandb_has_one_offline_run_a_round(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["round"] for line in lines} == {0, 1, 2}
    offline = list((run / "wandb").glob("offline-run-*"))
    assert {path.name.rsplit("-round-", 1)[1] for path in offline} == {"0", "1", "2"}


def test_running_the_same_command_again_does_no_stage_twice(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.glob("round-*/**/*") if path.is_file()}
    again = drive("conf=smoke", f"run.dir={run.parent}")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "training" not in again.stderr


def test_continuing_under_another_configuration_is_refused_with_the_keys_that_differ(run: Path) -> None:
    refused = drive("conf=smoke", f"run.dir={run.parent}", "search.rollouts=7")
    assert refused.returncode == 1
    assert "search.rollouts: 6 -> 7" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_round_without_the_artefacts_of_the_one_before_is_refused(tmp_path: Path) -> None:
    refused = drive("conf=smoke", f"run.dir={tmp_path}", "round=2")
    assert refused.returncode == 1
    assert "round 1 has no finished sft checkpoint" in refused.stderr
    assert not any(tmp_path.glob("*/round-*"))


def test_a_misspelt_key_is_refused_with_the_nearest_one() -> None:
    refused = drive("conf=smoke", "serach.rollouts=3")
    assert refused.returncode == 2
    assert "search" in refused.stderr
    assert "Traceback" not in refused.stderr
