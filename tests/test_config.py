"""Configuration: every mistake a user can make is named, with its place and its fix."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evolve.config import (
    CONF_DIR,
    ConfigError,
    command,
    differences,
    help_text,
    load,
    read,
    resolve_round,
    to_yaml,
    validate,
)
from evolve.schema import EvolveConfig, Generator, RoundConfig, ScoreForm, ValueKind

RECIPES = ("default", "quickstart", "smoke", "rstar_math")


def errors(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return str(caught.value)


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return f"conf={path}"


def schema_keys(value: object, prefix: str = "") -> set[str]:
    keys = set()
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        key = f"{prefix}{field.name}"
        keys |= schema_keys(item, key + ".") if dataclasses.is_dataclass(item) else {key}
    return keys


def yaml_keys(value: dict, prefix: str = "") -> set[str]:
    keys = set()
    for name, item in value.items():
        keys |= yaml_keys(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}"}
    return keys


def test_default_yaml_lists_exactly_the_keys_of_the_schema():
    listed = yaml_keys(yaml.safe_load((CONF_DIR / "default.yaml").read_text()))
    assert listed == schema_keys(EvolveConfig())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_validate(name):
    config = load([f"conf={name}"])
    validate(config)
    assert resolve_round(config, 1).generator is Generator.bootstrap


def test_the_paper_recipe_has_the_paper_numbers():
    config = load(["conf=rstar_math"])
    rounds = [resolve_round(config, k) for k in (1, 2, 3, 4)]
    assert [r.rollouts for r in rounds] == [8, 16, 16, 16]
    assert [r.candidates for r in rounds] == [5, 8, 8, 16]
    assert [r.trees + r.retry_trees for r in rounds] == [2, 2, 2, 2]
    assert [r.trees for r in rounds] == [1, 1, 1, 2]
    assert [r.escalation for r in rounds] == [(), (), (), (64, 128)]
    assert [r.value.name for r in rounds] == ["terminal", "terminal", "ppm", "ppm"]
    assert {r.exploration for r in rounds} == {2.0}
    assert (config.sft.epochs, config.sft.learning_rate, config.sft.batch) == (2, 7e-6, 128)
    assert (config.ppm.epochs, config.ppm.learning_rate, config.ppm.batch) == (1, 7e-6, 512)
    assert config.ppm.form is ScoreForm.head
    assert config.policy.bootstrap.engine.tensor_parallel == 8


def test_recipes_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(["conf=smoke"]).run.name == "smoke"


def test_a_recipe_may_be_a_path_and_is_merged_over_the_defaults(tmp_path):
    config = load([recipe(tmp_path, "search: {rollouts: 3}\n")])
    assert config.search.rollouts == 3
    assert config.search.candidates == load([]).search.candidates


def test_missing_recipe_names_those_there_are():
    text = errors("conf=quikstart")
    assert "quikstart" in text
    assert "quickstart, rstar_math, smoke" in text


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    # YAML 1.1 reads 7e-6 as text.
    assert load([recipe(tmp_path, "sft: {learning_rate: 7e-6}")]).sft.learning_rate == 7e-6
    assert load(["sft.learning_rate=3e-4"]).sft.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("search.rolouts=3", "search.rollouts"),
        ("rollouts=3", "search.rollouts"),
        ("serch.rollouts=3", "search.rollouts"),
        ("roun=3", "round"),
        ("rounds.2.rolouts=3", "rounds.2.rollouts"),
        ("tensor_parallel=2", "tensor_parallel"),
    ],
)
def test_unknown_key_names_the_nearest_one_and_its_place(argument, nearest):
    text = errors(argument)
    assert f"command line: {argument}" in text
    assert "did you mean" in text
    assert nearest in text


def test_unknown_key_in_a_file_is_named_with_file_and_line(tmp_path):
    text = errors(recipe(tmp_path, "search:\n  rollouts: 4\n  rolouts: 5\n"))
    assert "recipe.yaml:3: unknown key search.rolouts; did you mean search.rollouts?" in text


def test_all_errors_of_all_layers_are_reported_together(tmp_path):
    text = errors(recipe(tmp_path, "search:\n  rollouts: four\nproblems: 7\n"), "roun=1", "--plna")
    assert text.startswith("4 errors")
    for part in ("recipe.yaml:2", "recipe.yaml:3", "did you mean round?", "--plna"):
        assert part in text


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("search.rollouts=four", "a whole number"),
        ("search.rollouts=3.5", "a whole number"),
        ("search.rollouts=true", "a whole number"),
        ("search.rollouts=null", "a whole number"),
        ("sft.learning_rate=fast", "a number"),
        ("sft.learning_rate=nan", "a number"),
        ("search.escalation=64", "a list of whole numbers"),
        ("search.escalation=[64, many]", "a whole number"),
        ("run.allow_changes=yes", "true or false"),
        ("ppm.form=heads", "head"),
        ("search=3", "group of keys"),
        ("search.rollouts.more=3", "set search.rollouts itself"),
        ("rounds=3", "a list"),
        ("rounds=[3]", "entry 1 is not a mapping"),
    ],
)
def test_wrong_types_are_refused_and_the_right_one_named(argument, needed):
    assert needed in errors(argument)


def test_key_given_twice_is_refused(tmp_path):
    assert "given twice" in errors(recipe(tmp_path, "search:\n  rollouts: 4\n  rollouts: 5\n"))
    assert "given twice" in errors("search.rollouts=4", "search.rollouts=5")
    assert "given twice" in errors("conf=smoke", "conf=default")


def test_malformed_yaml_is_an_error_with_its_line(tmp_path):
    assert "recipe.yaml:2" in errors(recipe(tmp_path, "search: {rollouts: 3\nppm: }"))


def test_text_values_keep_their_spelling():
    assert load(["run.name=007"]).run.name == "007"


def test_interpolations_are_resolved_and_checked():
    config = load(["ppm.engine.max_model_len=${policy.engine.max_model_len}"])
    assert config.ppm.engine.max_model_len == config.policy.engine.max_model_len
    assert "nope" in errors("run.name=${nope}")
    assert "search.rollouts" in errors("search.rollouts=${run.name}")


def test_search_override_wins_over_every_round():
    config = load(["conf=rstar_math", "search.rollouts=32", "search.escalation=[7]"])
    assert [resolve_round(config, k).rollouts for k in (1, 2, 3, 4)] == [32] * 4
    assert [resolve_round(config, k).escalation for k in (1, 2, 3, 4)] == [(7,)] * 4
    assert resolve_round(config, 4).candidates == 16


def test_round_override_wins_over_search_override():
    config = load(["conf=rstar_math", "rounds.4.rollouts=99", "search.rollouts=32"])
    assert [resolve_round(config, k).rollouts for k in (1, 2, 3, 4)] == [32, 32, 32, 99]


def test_search_of_a_recipe_wins_over_rounds_it_inherits(tmp_path):
    config = load([recipe(tmp_path, "search: {value: terminal}\n")])
    assert {resolve_round(config, k).value for k in (1, 2, 3, 4)} == {ValueKind.terminal}


def test_rounds_count_from_one():
    assert "from 1" in errors("rounds.0.rollouts=3")
    assert "rounds 1 to 4" in errors("rounds.5.rollouts=3")
    with pytest.raises(IndexError):
        resolve_round(load([]), 0)


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["round=5"], "round"),
        (["round=0"], "round"),
        (["search.value=ppm"], "search.value"),
        (["rounds.1.value=ppm"], "rounds.1.value"),
        (["rounds.1.generator=previous"], "rounds.1.generator"),
        (["rounds=[]"], "rounds"),
        (["rounds.2.rollouts=-1"], "rounds.2.rollouts"),
        (["rounds.2.escalation=[0]"], "rounds.2.escalation"),
        (["problems.limit=-1"], "problems.limit"),
        (["problems.per_round=null"], "problems.per_round"),
        (["policy.temperature=0"], "policy.temperature"),
        (["policy.top_p=1.5"], "policy.top_p"),
        (["policy.format=prose"], "policy.format"),
        (["policy.max_step_tokens=768"], "policy.max_step_tokens"),
        (["policy.bootstrap.few_shot=nowhere.txt"], "policy.bootstrap.few_shot"),
        (["policy.engine.tensor_parallel=4"], "policy.engine.gpus"),
        (["policy.engine.gpus=1.5"], "policy.engine.gpus"),
        (["policy.engine.gpu_memory_utilization=1.1"], "policy.engine.gpu_memory_utilization"),
        (["sft.workers=3"], "sft.batch"),
        (["ppm.batch=33", "cluster.device=cpu"], "ppm.batch"),
        (["sft.zero_stage=4"], "sft.zero_stage"),
        (["sft.schedule=constant"], "sft.schedule"),
        (["sft.rows_tokens=100"], "sft.rows_tokens"),
        (["ppm.timeout_s=0"], "ppm.timeout_s"),
        (["ppm.negative_q=-2"], "ppm.negative_q"),
        (["ppm.engine.max_model_len=512"], "ppm.engine.max_model_len"),
        (["evaluate.samples=0"], "evaluate.samples"),
        (["verifier.cpu_s=0"], "verifier.cpu_s"),
        (["verifier.max_infrastructure_failures=2"], "verifier.max_infrastructure_failures"),
        (["toy.operations=13"], "toy.operations"),
        (["toy.difficulties=[7]"], "toy.difficulties"),
        (["toy.hidden_size=100"], "toy.hidden_size"),
        (["run.name=a/b"], "run.name"),
    ],
)
def test_impossible_values_are_refused_with_key_and_place(argv, key):
    with pytest.raises(ConfigError) as caught:
        load(argv)
    assert [c.what.split(":")[0] for c in caught.value.complaints] == [key]
    assert caught.value.complaints[0].mend


def test_validate_finds_what_was_changed_in_code():
    config = load([])
    config.search.rollouts = 0
    config.rounds.append(RoundConfig(trees=0))
    with pytest.raises(ConfigError, match=r"(?s)search\.rollouts.*rounds\.5\.trees"):
        validate(config)


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_configuration_survives_yaml(name, tmp_path):
    config = load([f"conf={name}", "run.seed=3"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read(path) == config


def test_differences_name_only_what_changes_results():
    a = load([])
    irrelevant = (
        "run.dir=elsewhere cluster.shards=2 wandb.mode=offline round=2 run.allow_changes=true ppm.timeout_s=5 "
        "policy.engine.start_timeout_s=5"
    )
    b = load(["search.rollouts=9", "rounds.2.trees=2", *irrelevant.split()])
    assert differences(a, b) == [
        ("search.rollouts", 8, 9),
        ("rounds.2.trees", None, 2),
    ]
    assert differences(a, a) == []


def test_differences_see_a_round_that_was_added():
    a, b = load([]), load([])
    b.rounds.append(RoundConfig(rollouts=5))
    assert ("rounds.5.rollouts", None, 5) in differences(a, b)


def test_plan_is_a_flag_and_not_a_setting():
    assert command(["conf=smoke", "--plan"]).plan
    assert not command(["conf=smoke"]).plan


def test_help_shows_every_key_and_starts_nothing(capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == help_text()
    assert "max_infrastructure_failures" in help_text()


def test_configuration_and_plan_import_nothing_heavy():
    code = (
        "import sys, evolve.config, evolve.schema, evolve.types, evolve.problems, evolve.plan\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'datasets', 'pyarrow', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
