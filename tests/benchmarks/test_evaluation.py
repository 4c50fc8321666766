"""`python -m benchmarks.evaluation`: a finished round on any problems, with evaluators that only pretend."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray

from benchmarks import evaluation
from evolve.config import load, to_yaml
from evolve.evaluate import Record, Sample
from evolve.fleet import Checkpoint
from evolve.policy.checkpoint import digest
from evolve.store.run import RunDirectory


class PretendedEvaluator:
    """Solves every second problem, whatever it is."""

    def evaluate(self, problems, job):
        samples = [Sample(correct=False, group=0, tokens=5, logprob=-1.0)] * job.samples
        return [asdict(Record(p.id, 1, bool(i % 2), 7, samples)) for i, p in enumerate(problems)]

    def finished(self, heard):
        return []


class PretendedFleet:
    """Two shards; remembers what it was made to serve."""

    def __init__(self, config, device):
        self.served, self.stopped = None, False
        actor = ray.remote(PretendedEvaluator).options(num_cpus=0, max_concurrency=1)
        self.groups = [SimpleNamespace(evaluator=actor.remote()) for _ in range(2)]
        PretendedFleet.last = self

    def load(self, policy, ppm):
        self.served = (policy, ppm)

    def poll(self):
        pass

    def stop(self):
        self.stopped = True
        for group in self.groups:
            ray.kill(group.evaluator)


@pytest.fixture
def run(tmp_path, monkeypatch, ray_cluster) -> RunDirectory:
    monkeypatch.setattr(evaluation, "Fleet", PretendedFleet)
    monkeypatch.setattr(evaluation.cluster, "connect", lambda config: "cpu")
    directory = RunDirectory(tmp_path / "mine")
    directory.base.mkdir(parents=True)
    (directory.base / "model.safetensors").write_bytes(b"weights")
    directory.config.write_text(to_yaml(load(["conf=smoke", "evaluate.samples=2"])))
    return directory


def test_a_rounds_checkpoints_are_measured_on_the_problems_asked_for(run, capsys):
    published = {stage: run.round(1).path / stage / "checkpoint" for stage in ("sft", "ppm")}
    for stage, path in published.items():
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(stage.encode())
        run.round(1).record(stage, digest=digest(path))
    before = run.round(1).manifest()
    assert evaluation.main([str(run.path), "--round", "1", "problems.test_size=8", "evaluate.samples=3"]) == 0
    (path,) = (run.path / "evaluations").iterdir()
    found = json.loads(path.read_text())
    assert len(found["records"]) == 8
    assert all(len(record["samples"]) == 3 for record in found["records"])
    greedy = found["rows"][0]
    assert (greedy["method"], greedy["accuracy"]["value"], greedy["problems"]) == ("greedy", 0.5, 8)
    policy, ppm = PretendedFleet.last.served
    assert [policy, ppm] == [Checkpoint(str(path), digest(path)) for path in published.values()]
    assert PretendedFleet.last.stopped
    assert "mine, round 1" in capsys.readouterr().out
    assert run.round(1).manifest() == before


def test_round_0_is_the_base_model_without_a_ppm(run):
    assert evaluation.main([str(run.path), "--round", "0", "problems.test_size=4"]) == 0
    assert PretendedFleet.last.served == (Checkpoint(str(run.base), digest(run.base)), None)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--round", "2"], 1, "round 2 has no finished sft checkpoint"),
        (["--round", "0", "evaluate.sample=3"], 2, "did you mean evaluate.samples"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run, capsys, arguments, status, said):
    assert evaluation.main([str(run.path), *arguments]) == status
    assert said in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_said(tmp_path, capsys):
    assert evaluation.main([str(tmp_path), "--round", "1"]) == 1
    assert "no run directory" in capsys.readouterr().err
