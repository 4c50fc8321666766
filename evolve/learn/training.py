"""One training on one of its workers: steps, checkpoints, evaluation, and the published result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evolve.files import Lines, is_published, place, publish_directory, remove_tree, workshop
from evolve.learn.data import Data, gather_rows, load_data
from evolve.learn.errors import LearningError, TrainingStopped, TrainingTimeoutError
from evolve.learn.forest import Pairs
from evolve.learn.jobs import RESULT_FILE, TrainJob, TrainResult
from evolve.learn.packing import Completions, MicroBatch, plan_steps, worker_batches
from evolve.learn.resuming import discard_checkpoints, find_checkpoint
from evolve.policy.checkpoint import digest, resolve
from evolve.schema import PPMConfig, ScoreForm

_PROGRESS_S = 0.5
T = TypeVar("T")
Report = Callable[[Mapping[str, float]], bool]
"""Takes a step's metrics to the driver; false when the training is to stop."""
Note = Callable[[str], object]
"""Takes a line for the user to the driver."""


def run_job(job: TrainJob, report: Report, note: Note) -> TrainResult:
    """Train and publish one checkpoint; called by all workers at once. Finished jobs are only looked up."""

    done = _first_says(lambda: _prepare(job))
    if done is not None:
        return done
    training = Training(job, report, note)
    try:
        return training.run()
    finally:
        training.release()


def _prepare(job: TrainJob) -> TrainResult | None:
    """The result of this very job, when it was published before; else make its working directory."""
    output = place(job.output)
    if is_published(output):
        file = output / RESULT_FILE
        if not file.is_file() or (known := json.loads(file.read_text()))["job"] != job.digest():
            raise LearningError(
                f"{job.output} exists and is not the result of this training: move it away, or choose another output"
            )
        if digest(job.output) != known["digest"]:
            raise LearningError(f"{job.output} is not what its {RESULT_FILE} says: delete it to train it again")
        remove_tree(job.partial)  # of a worker that died once it had published
        return TrainResult(job.kind, job.output, known["metrics"])
    if not (place(job.initial) / "config.json").is_file():
        raise LearningError(f"{job.initial} is no checkpoint directory: it has no config.json")
    job.partial.mkdir(parents=True, exist_ok=True)
    gather_rows(job)
    return None


def _first_says(question: Callable[[], T]) -> T:
    """What the first worker answers, on every worker; or the `LearningError` it raises.

    For what the file system says, which may not look the same from every node at once.
    """
    import torch.distributed as dist

    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [question()]
        except LearningError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], LearningError):
        raise box[0]
    return box[0]


class Training:
    """One job in the making, on one worker."""

    def __init__(self, job: TrainJob, report: Report, note: Note) -> None:
        import torch
        import torch.distributed as dist

        from evolve.learn import engine
        from evolve.learn.ppm import PPMObjective
        from evolve.learn.sft import SFTObjective

        self.job, self.config, self.report, self.note = job, job.config, report, note
        self.told_to_stop = False
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.started = time.monotonic()
        initial = Path(resolve(job.initial))
        self.lines = Lines(place(job.metrics)) if job.metrics is not None else None
        ppm = job.config if isinstance(job.config, PPMConfig) else None

        model_config = json.loads((initial / "config.json").read_text())
        self.data, self.validation = load_data(job, int(model_config.get("hidden_size", 1024)))
        self.plan = plan_steps(self.data.sizes, job.config.batch, job.config.epochs, job.seed)
        torch.manual_seed(job.seed)
        self.model = engine.load_model(initial, job.config, classifier=ppm is not None and ppm.form is ScoreForm.head)
        self.pad_id = self._padding()
        objective = (
            SFTObjective(self.model) if ppm is None else PPMObjective(self.model, ppm.form, ppm.beta, ppm.anchor)
        )
        self.engine = engine.start(objective, job.config)
        self.device = engine.device()
        self.identity = _first_says(job.digest)
        self.digest = f"{self.identity} {self.workers} {len(self.plan)} {int(self.data.lengths.sum())}"

    def _padding(self) -> int:
        """The id that fills rows. A classifier's must be known to whoever loads it, and end no step."""
        known = self.model.config.pad_token_id
        if not isinstance(self.config, PPMConfig) or self.config.form is not ScoreForm.head:
            return 0
        if known is None:
            raise LearningError(
                f"{self.job.initial}: a PPM with a scalar head needs `pad_token_id` in config.json, to find the "
                "last token of a padded sequence; set it to a token that ends no step"
            )
        if isinstance(self.data, Pairs) and self.data.ends_with(known):
            raise LearningError(
                f"{self.job.rows[0]}: a step ends with the padding token {known}, so that its last token would "
                "not be found; choose another `pad_token_id`"
            )
        return known

    def run(self) -> TrainResult:
        """Train to the end from wherever a checkpoint left it, and publish."""
        from evolve.learn import engine as ds

        resumed, complaint = _first_says(lambda: find_checkpoint(self.job.partial, self.digest))
        if complaint and self.rank == 0:
            self.note(complaint)
            discard_checkpoints(self.job.partial)
        self._measure_reference()
        before = self._evaluate() if not resumed else {}
        history: list[float] = []
        tokens = 0
        if resumed:
            kept = ds.load_checkpoint(self.engine, self.job.partial, resumed)
            history, tokens, before = kept["history"], kept["tokens"], kept["before"]
        told = 0.0
        for step in range(resumed, len(self.plan)):
            last = self._step(step)
            more = step + 1 < len(self.plan)
            late, stopped = bool(last.pop("late")) and more, bool(last.pop("stopped")) and more
            history.append(last["loss"])
            tokens += int(last["tokens"])
            if self.rank == 0:
                self._append(last)
                if time.monotonic() - told > _PROGRESS_S:
                    told = time.monotonic()
                    self.told_to_stop = not self.report(last)
            if late or stopped or ((step + 1) % self.config.checkpoint_steps == 0 and more):
                extra = {"history": history, "tokens": tokens, "before": before}
                self._keep_lines()
                ds.save_checkpoint(self.engine, self.job.partial, step + 1, self.digest, extra)
            if stopped:
                raise TrainingStopped(f"{self.job.kind} training of {self.job.output} stopped after step {step + 1}")
            if late:
                raise TrainingTimeoutError(
                    f"{self.job.kind} training of {self.job.output} is not done after "
                    f"{self.config.timeout_s:.0f} s (step {step + 1} of {len(self.plan)}); raise `timeout_s`, or "
                    "run again to go on from here"
                )
        return self._publish(self._summary(history, tokens, resumed, last, before))

    def _summary(
        self,
        history: list[float],
        tokens: int,
        resumed: int,
        last: Mapping[str, float],
        before: Mapping[str, float],
    ) -> dict[str, float]:
        """The metrics that `TrainResult` describes."""
        seconds = time.monotonic() - self.started
        last_epoch = history[-max(1, round(len(history) / self.config.epochs)) :]
        metrics: dict[str, float] = {
            "loss": float(np.mean(last_epoch)),
            "first_loss": history[0],
            "steps": len(self.plan),
            "items": len(self.data.lengths),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "overlong": self.data.overlong,
            "unsupervised": self.data.unsupervised,
            "resumed_from": resumed,
        }
        if isinstance(self.data, Completions):
            return metrics | {"token_accuracy": last["accuracy"]}
        metrics |= {"pairs": self.data.pairs, "pair_accuracy_train": last["accuracy"]} | self._evaluate()
        if before:
            metrics["pair_accuracy_before"] = before["pair_accuracy"]
        return metrics

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step over all workers. Its loss is a mean over the whole batch, however it is dealt."""
        import torch
        import torch.distributed as dist

        from evolve.learn import engine as ds

        items = self.plan[step].tolist()
        weight = float(self.data.weights[items].sum())
        if weight <= 0:
            raise LearningError(f"step {step} of {self.job.output} supervises nothing")
        rate = ds.learning_rate(self.config, step, len(self.plan))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.job.seed + step)
        begin = time.monotonic()
        batches = worker_batches(items, self.data.lengths, self.config.rows_tokens, self.workers, self.rank)
        total = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.engine.train()
        for number, batch in enumerate(batches):
            loss, right = self._forward(self.data, batch)
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            # The engine averages over workers; the factor turns that into the sum that `weight` divides.
            self.engine.backward(loss * (self.workers / weight))
            self.engine.step()
            total[:2] += torch.stack([loss.detach().double(), right.double()])
        # Clocks differ; whether time is up must not.
        total[2] = time.monotonic() - self.started > self.config.timeout_s
        total[3] = self.told_to_stop
        dist.all_reduce(total)
        if not torch.isfinite(total[0]):
            raise LearningError(
                f"the loss of step {step} of {self.job.output} is not finite; lower `learning_rate` "
                f"({self.config.learning_rate})"
            )
        units = weight if isinstance(self.data, Completions) else float(self.data.sizes[items].sum())
        tokens = int(self.data.lengths[items].sum())
        norm = self.engine.get_global_grad_norm()
        return {
            "step": step + 1,
            "steps": len(self.plan),
            "loss": float(total[0]) / weight,
            "accuracy": float(total[1]) / units,
            "grad_norm": float(norm) if norm is not None else 0.0,
            "learning_rate": rate,
            "tokens": tokens,
            "tokens_per_second": tokens / (time.monotonic() - begin),
            "elapsed_s": time.monotonic() - self.started,
            "late": float(total[2]),
            "stopped": float(total[3]),
        }

    def _forward(self, data: Data, batch: MicroBatch) -> tuple[Any, Any]:
        """Loss, and how many predictions are right."""
        loss, right, *_ = self._outputs(data, batch)
        return loss, right

    def _outputs(self, data: Data, batch: MicroBatch) -> Any:
        import torch

        arrays = data.collate(batch, self.pad_id)
        tensors = {
            f.name: torch.from_numpy(getattr(arrays, f.name)).to(self.device, non_blocking=True) for f in fields(arrays)
        }
        return self.engine(**tensors)

    def _measure_reference(self) -> None:
        """Log-probabilities before training, for a PPM's anchor; every worker reads its share and gets all."""
        import torch
        import torch.distributed as dist

        if not isinstance(self.config, PPMConfig) or self.config.form is ScoreForm.head or not self.config.anchor:
            return
        self.engine.eval()
        for data in (self.data, self.validation):
            if not isinstance(data, Pairs) or not len(data.lengths):
                continue
            found = torch.zeros(len(data.reference), device=self.device)
            items = list(range(len(data.lengths)))
            with torch.no_grad():
                for batch in worker_batches(items, data.lengths, self.config.rows_tokens, self.workers, self.rank):
                    logprobs, start = self._outputs(data, batch)[2], 0
                    for item in (item for row in batch for item in row):
                        first, end = data.offsets[item], data.offsets[item + 1]
                        found[first:end] = logprobs[start : start + end - first]
                        start += end - first
            dist.all_reduce(found)
            data.reference = found.cpu().numpy()

    def _evaluate(self) -> dict[str, float]:
        """Pair accuracy and loss on the held-out problems; empty where there are none."""
        import torch
        import torch.distributed as dist

        data = self.validation
        if data is None or not len(data.lengths):
            return {}
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.engine.eval()
        items = list(range(len(data.lengths)))
        with torch.no_grad():
            for batch in worker_batches(items, data.lengths, self.config.rows_tokens, self.workers, self.rank):
                loss, right = self._forward(data, batch)
                total += torch.stack([loss.double(), right.double()])
        dist.all_reduce(total)
        return {
            "validation_pairs": data.pairs,
            "validation_loss": float(total[0]) / float(data.weights.sum()),
            "pair_accuracy": float(total[1]) / data.pairs,
        }

    def _append(self, metrics: Mapping[str, float]) -> None:
        if self.lines is not None:
            self.lines.add(json.dumps({"kind": self.job.kind, **metrics}))

    def _keep_lines(self) -> None:
        if self.rank == 0 and self.lines is not None:
            self.lines.publish()

    def _publish(self, metrics: dict[str, float]) -> TrainResult:
        import torch.distributed as dist

        from evolve.learn import engine as ds

        weights = ds.consolidated(self.engine, self.model)
        self._keep_lines()
        if self.rank == 0:
            aside = workshop(self.job.partial) / "model"
            ds.write_model(self.model, weights, Path(resolve(self.job.initial)), aside)
            record = {
                "job": self.identity, "digest": digest(aside), "metrics": metrics, "settings": asdict(self.job)
            }  # fmt: skip
            (aside / RESULT_FILE).write_text(json.dumps(record, indent=1, default=str))
            publish_directory(aside, place(self.job.output))
            remove_tree(self.job.partial)
        dist.barrier()
        return TrainResult(self.job.kind, self.job.output, metrics)

    def release(self) -> None:
        """Free the engine, so that the next job has the memory."""
        self.engine.destroy()
        del self.engine, self.model
