"""Training through Ray Train and DeepSpeed on two CPU workers."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evolve.learn import rows
from evolve.learn.errors import LearningError, TrainingTimeoutError
from evolve.learn.jobs import TrainJob, TrainResult, Workers
from evolve.learn.trainer import TrainerGroup
from evolve.schema import PPMConfig, Precision, ScoreForm, SFTConfig
from evolve.types import StepPair, Trajectory

COMMON: dict[str, Any] = {
    "precision": Precision.fp32, "max_length": 64, "rows_tokens": 128, "learning_rate": 1e-3, "timeout_s": 120.0,
}  # fmt: skip
SFT = SFTConfig(epochs=2, batch=8, zero_stage=1, **COMMON)
LOGPROB = PPMConfig(epochs=1, batch=16, form=ScoreForm.logprob, beta=0.3, validation_share=0.3, zero_stage=1, **COMMON)
HEAD = replace(LOGPROB, form=ScoreForm.head, beta=1.0)


@pytest.fixture(scope="module")
def group(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerGroup]:
    with TrainerGroup(Workers(2), tmp_path_factory.mktemp("ray")) as two:
        yield two


@pytest.fixture
def files(
    tmp_path: Path,
    trajectories: Callable[..., list[Trajectory]],
    step_pairs: Callable[..., list[StepPair]],
) -> dict[str, tuple[str, ...]]:
    rows.write(rows.to_table(trajectories(22)), tmp_path / "sft.parquet")
    rows.write(rows.to_table(step_pairs(12)), tmp_path / "ppm.arrow")
    return {"sft": (str(tmp_path / "sft.parquet"),), "ppm": (str(tmp_path / "ppm.arrow"),)}


def losses(path: Path) -> dict[int, float]:
    """Loss by step; of a step that was done twice the last."""
    return {line["step"]: line["loss"] for line in map(json.loads, path.read_text().splitlines())}


def weights(path: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def same_weights(a: str, b: str, tolerance: float) -> None:
    import torch

    first, second = weights(a), weights(b)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=name)


def plain_sft_loss(model: Any, some: list[Trajectory]) -> float:
    """Mean over supervised tokens, computed without packing or DeepSpeed."""
    import torch

    total, count = 0.0, 0
    for t in some:
        ids = torch.tensor([[*t.prompt_ids, *t.token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        at = [len(t.prompt_ids) + i for i, s in enumerate(t.sampled) if s]
        total -= sum(float(logprobs[i - 1, ids[0, i]]) for i in at)
        count += len(at)
    return total / count


def test_sft_then_ppm_in_one_group(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path,
    trajectories: Callable[..., list[Trajectory]],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    sft = TrainJob(
        replace(SFT, epochs=6), str(tiny_model), files["sft"], str(tmp_path / "sft"), metrics=str(tmp_path / "m")
    )
    logprob = TrainJob(LOGPROB, sft.output, files["ppm"], str(tmp_path / "logprob"))
    head = TrainJob(HEAD, sft.output, files["ppm"], str(tmp_path / "head"))
    seen: list[str] = []
    results = group.fit([sft, logprob, head], on_progress=lambda job, metrics: seen.append(job.kind))
    assert [r.kind for r in results] == ["sft", "ppm", "ppm"]
    assert {"sft", "ppm"} <= set(seen)

    trained = AutoModelForCausalLM.from_pretrained(sft.output)
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    some = trajectories(22)
    assert results[0].metrics["steps"] == 6 * 3
    assert plain_sft_loss(trained, some) < plain_sft_loss(start, some) - 0.5
    assert losses(tmp_path / "m")[18] == pytest.approx(plain_sft_loss(trained, some), abs=0.3)
    assert not Path(sft.output + ".partial").exists()
    assert AutoTokenizer.from_pretrained(sft.output).pad_token_id == 0

    for result in results[1:]:
        assert result.metrics["validation_pairs"] > 0
        assert 0 <= result.metrics["pair_accuracy_before"] <= 1
        assert result.metrics["pair_accuracy"] >= 0.5
        assert result.metrics["pairs"] + result.metrics["validation_pairs"] == 12 * 3 * 4
    classifier = AutoModelForSequenceClassification.from_pretrained(head.output)
    assert (classifier.config.num_labels, classifier.config.pad_token_id) == (1, 0)
    assert type(classifier).__name__ == "Qwen2ForSequenceClassification"
    assert sorted(weights(logprob.output)) == sorted(start.state_dict())

    again = group.fit([sft])
    assert again[0].metrics == results[0].metrics, "a published result is looked up, not trained again"
    with pytest.raises(LearningError, match="exists and is not the result"):
        group.fit([replace(sft, seed=9)])


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_all_zero_stages_train_the_same_model(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path, stage: int, precision: str
) -> None:  # fmt: skip
    from evolve.learn.jobs import RESULT_FILE

    reference = TrainJob(SFT, str(tiny_model), files["sft"], str(tmp_path / "reference"))
    other = replace(
        reference,
        config=replace(SFT, zero_stage=stage, precision=Precision(precision)),
        output=str(tmp_path / "other"),
    )
    first, second = group.fit([reference, other])
    exact = precision == "fp32"
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-4 if exact else 0.05)
    if exact:
        same_weights(reference.output, other.output, 2e-4)
    settings = json.loads((Path(other.output) / RESULT_FILE).read_text())["settings"]
    assert settings["config"]["zero_stage"] == stage
    if stage == 3:
        ppm = TrainJob(
            replace(HEAD, zero_stage=3, precision=Precision(precision)), other.output, files["ppm"],
            str(tmp_path / "ppm"),
        )  # fmt: skip
        assert group.fit([ppm])[0].metrics["steps"] > 0


def test_the_loss_does_not_depend_on_the_number_of_workers(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    def jobs(name: str) -> list[TrainJob]:
        return [
            TrainJob(
                c, str(tiny_model), files[k], str(tmp_path / f"{name}-{k}"), metrics=str(tmp_path / f"m-{name}-{k}")
            )
            for c, k in ((SFT, "sft"), (LOGPROB, "ppm"))
        ]

    group.fit(jobs("two"))
    with TrainerGroup(Workers(1), tmp_path / "ray") as one:
        one.fit(jobs("one"))
        for kind in ("sft", "ppm"):
            two_losses, one_losses = losses(tmp_path / f"m-two-{kind}"), losses(tmp_path / f"m-one-{kind}")
            assert len(one_losses) > 1
            assert two_losses == pytest.approx(one_losses, abs=1e-4)
            same_weights(str(tmp_path / f"one-{kind}"), str(tmp_path / f"two-{kind}"), 2e-4)


def test_a_training_that_takes_too_long_stops_and_can_go_on_from_there(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    late = TrainJob(replace(SFT, epochs=20, timeout_s=0.01), str(tiny_model), files["sft"], str(tmp_path / "late"))
    with pytest.raises(TrainingTimeoutError, match=r"late is not done after 0 s \(step 1 of 60\)"):
        group.fit([late])
    assert not Path(late.output).exists()
    result = group.fit([replace(late, config=replace(late.config, timeout_s=120.0))])[0]
    assert result.metrics["resumed_from"] == 1


def test_the_user_is_told_of_a_checkpoint_that_cannot_be_gone_on_from(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    late = TrainJob(replace(SFT, epochs=20, timeout_s=0.01), str(tiny_model), files["sft"], str(tmp_path / "late"))
    with pytest.raises(TrainingTimeoutError):
        group.fit([late])
    [meta] = late.partial.glob("checkpoint-*/meta.json")
    assert json.loads(meta.read_text())["workers"] == 2
    meta.write_text("{")
    notes: list[str] = []
    again = replace(late, config=replace(late.config, timeout_s=120.0))
    assert group.fit([again], on_note=notes.append)[0].metrics["resumed_from"] == 0
    assert notes == [f"{meta} is damaged: starting afresh"]


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    config = replace(SFT, epochs=60, checkpoint_steps=40)
    quiet = TrainJob(config, str(tiny_model), files["sft"], str(tmp_path / "quiet"), metrics=str(tmp_path / "q"))
    hit = replace(quiet, output=str(tmp_path / "hit"), metrics=str(tmp_path / "h"))
    group.fit([quiet])

    victims: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(hit.partial.glob("checkpoint-*/meta.json")):
            time.sleep(0.01)
        victims.append(group.pids()[1])
        os.kill(victims[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    result: TrainResult = group.fit([hit])[0]
    thread.join()
    assert victims[0] not in group.pids().values()
    assert result.metrics["resumed_from"] % 40 == 0
    assert result.metrics["resumed_from"] > 0
    assert losses(tmp_path / "h") == pytest.approx(losses(tmp_path / "q"), abs=1e-4)
    same_weights(quiet.output, hit.output, 2e-4)


def test_a_group_that_is_closed_leaves_a_checkpoint_and_another_goes_on_from_it(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    config = replace(SFT, epochs=80, checkpoint_steps=10_000)
    long = TrainJob(config, str(tiny_model), files["sft"], str(tmp_path / "o"))

    def close(job: TrainJob, metrics: Any) -> None:
        if metrics.get("step", 0) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), TrainerGroup(Workers(2), tmp_path / "ray") as one:
        one.fit([long], close)
    assert list(long.partial.glob("checkpoint-*/meta.json"))
    assert group.fit([long])[0].metrics["resumed_from"] > 20


@pytest.mark.parametrize("ends", [False, True], ids=["in a training", "after it"])
def test_a_mailbox_that_dies_costs_nothing(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path, ends: bool
) -> None:
    import ray

    job = TrainJob(
        replace(SFT, epochs=60), str(tiny_model), files["sft"], str(tmp_path / "o"), metrics=str(tmp_path / "m")
    )
    workers = group.pids()
    killed: list[float] = []

    def kill(job: TrainJob, metrics: Any) -> None:
        if not killed and metrics["step"] > 20:
            while ends and not Path(job.output).exists():
                time.sleep(0.05)
            killed.append(metrics["step"])
            ray.kill(group._mailbox, no_restart=False)

    result = group.fit([job], kill)[0]
    assert killed
    assert result.metrics["resumed_from"] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "m").read_text().splitlines()]
    assert steps == list(range(1, 181)), "no step was done twice"
    again = replace(job, output=str(tmp_path / "other"), config=SFT)
    assert group.fit([again])[0].metrics["steps"] == 6
    assert group.pids() == workers, "the workers lived on"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch": 1}, "number of workers, 2"),
        ({"rows_tokens": 32}, "rows_tokens"),
        ({"schedule": "step"}, "linear or cosine"),
        ({"zero_stage": 0, "precision": Precision.bf16}, "fp32"),
        ({"workers": 3}, "has 2"),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(change: dict[str, Any], complaint: str) -> None:
    job = TrainJob(replace(SFT, **change), "model", ("rows.parquet",), "out")
    with pytest.raises(LearningError, match=complaint):
        TrainerGroup(Workers(2), "unused").fit([job])


def test_rows_that_cannot_be_trained_on_are_an_error_and_the_group_goes_on(
    group: TrainerGroup, tiny_model: Path, files: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    rows.write(rows.to_table([], Trajectory), tmp_path / "none.parquet")
    empty = TrainJob(SFT, str(tiny_model), (str(tmp_path / "none.parquet"),), str(tmp_path / "empty"))
    with pytest.raises(LearningError, match="nothing to train on"):
        group.fit([empty])
    with pytest.raises(LearningError, match=r"no config\.json"):
        group.fit([replace(empty, initial=str(tmp_path))])
    fine = replace(empty, rows=files["sft"], output=str(tmp_path / "fine"))
    assert group.fit([fine])[0].metrics["steps"] == 6
