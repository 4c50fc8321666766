"""The plan: figures that add up, on a machine that has nothing of what is planned."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from evolve.attach import UnreachableError
from evolve.config import load
from evolve.estimate import expansions, plan
from evolve.placement import Node, Resources, local_resources
from evolve.plan import WIDTH, render, show_plan
from evolve.schema import ToyConfig
from evolve.sizes import model_size

LAPTOP = Resources((Node(cpus=2),))
NODES = Resources((Node(cpus=96, gpus=8), Node(cpus=96, gpus=8)))


def test_expansions_of_a_chain_of_one_candidate_are_its_steps():
    assert expansions(rollouts=1, candidates=1, steps=8) == 8
    # With one candidate there is nothing else to explore: later rollouts only walk further down.
    assert expansions(rollouts=4, candidates=1, steps=3) == 3 + 2 + 1 + 0


def test_expansions_count_first_steps_once_and_siblings_anew():
    # The first rollout expands 3 nodes; the next two start at siblings of its first step: 2 each.
    assert expansions(rollouts=3, candidates=3, steps=3) == 3 + 2 + 2
    # The fourth and following find all first steps visited and leave the tree one step later.
    assert expansions(rollouts=5, candidates=3, steps=3) == 3 + 2 + 2 + 1 + 1


def test_paper_recipe_is_planned_on_a_machine_without_gpus():
    found = plan(load(["conf=rstar_math"]), LAPTOP)
    assert found.unit == "GPU"
    assert [e.problems for e in found.rounds] == [747_000] * 4
    assert [e.most_trees for e in found.rounds] == [2 * 747_000] * 3 + [4 * 747_000]
    assert found.rounds[0].model.parameters == 236e9
    assert found.rounds[0].shard.policy_gpus == 8
    assert [e.shard.ppm_gpus for e in found.rounds] == [0, 0, 1, 1]
    assert [e.shard.fits for e in found.rounds] == [0] * 4
    assert len([m for m in found.missing if "a shard needs" in m]) == 4
    for estimate in found.rounds:
        assert estimate.problems <= estimate.trees <= estimate.most_trees
        assert all(hours > 0 for hours in estimate.hours.values())
    assert [e.scored_tokens > 0 for e in found.rounds] == [False, False, True, True]


def test_figures_are_products_of_their_factors():
    (estimate,) = plan(load(["problems.per_round=100", "round=1", "search.rollouts=3"]), LAPTOP).rounds
    assert estimate.trees == 100
    assert estimate.rollouts == 300
    assert estimate.candidates == 100 * expansions(3, 6, 4) * 6
    assert estimate.generated_tokens == estimate.candidates * 20


def test_shards_are_counted_by_the_scarcer_of_gpus_and_cpus():
    found = plan(load(["conf=rstar_math"]), NODES)
    assert [e.shard.fits for e in found.rounds] == [2, 16, 8, 8]
    assert found.missing == ()
    few = Resources((Node(cpus=25, gpus=8),))
    assert [e.shard.fits for e in plan(load(["conf=rstar_math"]), few).rounds] == [1, 2, 2, 2]


def test_more_shards_than_fit_are_missing():
    found = plan(load(["conf=rstar_math", "cluster.shards=9", "round=3"]), NODES)
    assert "shards that fit: 8 of 9" in found.missing[0]


def test_what_nodes_that_may_be_added_would_mend_is_waited_for_and_not_missing():
    growing = Resources((Node(cpus=8),), grows=True)
    found = plan(load(["conf=rstar_math", "cluster.shards=9", "round=3", "cluster.device=gpu"]), growing)
    assert found.missing == ()
    assert any("shards that fit: 0 of 9" in line for line in found.waits)
    assert any("at least 1 GPU" in line for line in found.waits)
    assert "waits for nodes that may be added: " in " ".join(render(found).split())
    assert plan(load(["conf=rstar_math", "sft.batch=100"]), replace(NODES, grows=True)).missing != ()


def test_batch_that_the_gpus_cannot_share_is_missing():
    found = plan(load(["conf=rstar_math", "sft.batch=100"]), NODES)
    assert any("sft.batch=100" in line and "16" in line for line in found.missing)


def test_default_recipe_lacks_nothing_on_a_laptop():
    found = plan(load([]), LAPTOP)
    assert (found.unit, found.missing, found.trainer_workers) == ("core", (), 2)
    assert local_resources().cpus >= 1


def test_problems_of_local_files_are_counted_and_others_assumed_aloud(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"problem": "q", "answer": "1"}\n' * 500)
    counted = plan(load([f"problems.path={source}", "problems.per_round=null"]), LAPTOP)
    assert counted.rounds[0].problems == 100
    assumed = plan(load(["problems.path=some/set", "problems.per_round=null"]), LAPTOP)
    assert any("some/set cannot be read here: 100,000 problems assumed" in line for line in assumed.assumptions)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("Qwen/Qwen2.5-Math-7B", 7e9, 7e9),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", 1.5e9, 1.5e9),
        ("org/tiny-350M", 350e6, 350e6),
        ("Qwen/Qwen3-30B-A3B", 30e9, 3e9),
        ("deepseek-ai/DeepSeek-Coder-V2-Instruct", 236e9, 21e9),
    ],
)
def test_sizes_of_models_are_read_from_their_names(name, parameters, active):
    size = model_size(name, ToyConfig())
    assert (size.parameters, size.active) == (parameters, active)


def test_unknown_size_is_said_to_be_assumed():
    assert "assumed" in model_size("org/mystery", ToyConfig()).source


def test_size_of_a_directory_is_that_of_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2000)
    assert model_size(str(tmp_path), ToyConfig()).parameters == 1000


@pytest.mark.parametrize("name", ["default", "quickstart", "smoke", "rstar_math"])
def test_rendered_plan_fits_the_width_and_shows_all_rounds(name):
    config = load([f"conf={name}"])
    text = render(plan(config, LAPTOP))
    assert max(map(len, text.splitlines())) <= WIDTH
    for k in range(1, len(config.rounds) + 1):
        assert f"round {k} search" in text
    for heading in ("configuration, as resolved", "arithmetic", "assumptions", "missing on this cluster"):
        assert heading in text


def test_rendered_plan_shows_the_arithmetic():
    text = render(plan(load(["conf=rstar_math"]), LAPTOP))
    assert "747,000 problems x (1 + 39.8% unsolved x 1 further) = 1,044,306; at most 1,494,000" in text


def test_early_stop_is_said_to_be_left_out_of_the_figures_of_the_rounds_that_have_it():
    figures = [plan(load(["problems.per_round=100", *more]), LAPTOP).rounds for more in ([], ["search.settled=3"])]
    assert [e.trees for e in figures[0]] == [e.trees for e in figures[1]]
    assert not any("early stop" in line for e in figures[0] for line in e.arithmetic)
    assert all(any("early stop (settled=3" in line for line in e.arithmetic) for e in figures[1])


def test_plan_loads_no_engine_and_no_trainer():
    code = (
        "import sys\n"
        "from evolve.config import load\nfrom evolve.estimate import plan\n"
        "from evolve.placement import local_resources\n"
        "from evolve.plan import render\n"
        "render(plan(load(['conf=rstar_math']), local_resources()))\n"
        "sys.exit(' '.join({'torch', 'ray', 'vllm', 'transformers', 'datasets'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_cluster_that_does_not_answer_is_an_error_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UnreachableError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 \(.*refused"):
        show_plan(load([]))


def test_plan_is_printed_for_this_machine_where_there_is_no_cluster(monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    show_plan(load(["conf=smoke"]))
    assert f"this cluster: 1 node, {local_resources().cpus:g} CPUs" in capsys.readouterr().out
