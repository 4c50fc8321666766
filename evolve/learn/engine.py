"""DeepSpeed around one model: loading, the engine, the learning rate, checkpoints and the published result."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from evolve.files import (
    Place,
    files_below,
    local_directory,
    publish_shares,
    put_share,
    workshop,
)
from evolve.learn.errors import LearningError
from evolve.learn.resuming import discard_checkpoints
from evolve.remote import RemotePath
from evolve.schema import Precision, TrainConfig

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""What goes with a model's weights unchanged."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings. Accumulation is driven by the caller, hence 1 here."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 2**31,
    }


def dtype_of(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision is Precision.bf16 else torch.float32


@contextmanager
def _partitioned_loading(config: TrainConfig) -> Iterator[None]:
    """Under ZeRO-3, makes transformers load each worker's share of the weights only."""
    # transformers keeps a weak reference to this object; it counts as switched on while one lives.
    switch = HfDeepSpeedConfig(deepspeed_config(config)) if config.zero_stage == 3 else None
    yield
    del switch


def load_model(initial: Path, config: TrainConfig, classifier: bool) -> PreTrainedModel:
    """The checkpoint in `initial` as a causal language model, or as a classifier with one label."""
    arguments: dict[str, Any] = {"dtype": dtype_of(config), "attn_implementation": "sdpa"}
    with _partitioned_loading(config):
        if classifier:
            model = AutoModelForSequenceClassification.from_pretrained(initial, num_labels=1, **arguments)
        else:
            model = AutoModelForCausalLM.from_pretrained(initial, **arguments)
    restore_rotary(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def restore_rotary(model: nn.Module) -> None:
    """Recompute every rotary embedding's frequencies in fp32.

    Loading in bf16 under ZeRO-3 casts these buffers to bf16, and nothing says so: positions are then off by
    up to 0.4 %, and the model differs from the one that inference loads.
    """
    for module in model.modules():
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if n.endswith("inv_freq")}
        if not buffers:
            continue
        fresh = dict(type(module)(module.config).named_buffers(recurse=False))
        for name, buffer in buffers.items():
            setattr(module, name, fresh[name].float().to(buffer.device))


def wrong_rotary(model: nn.Module) -> list[str]:
    """Names of rotary frequencies that are not fp32."""
    return [n for n, b in model.named_buffers() if n.endswith("inv_freq") and b.dtype is not torch.float32]


def start(objective: nn.Module, config: TrainConfig) -> Any:
    """A DeepSpeed engine for `objective`, whose `.model` is what was loaded."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in objective.parameters():
        # ZeRO-3 flattens parameters; `ds_shape` is what they were.
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        (decayed if matrix and config.weight_decay else others).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed, "weight_decay": config.weight_decay})
    groups = [group for group in groups if group["params"]]
    # torch's own AdamW: DeepSpeed's would be compiled at first use.
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=deepspeed_config(config))
    if wrong := wrong_rotary(engine.module):
        raise RuntimeError(f"rotary frequencies lost precision: {wrong[0]} is not fp32")
    return engine


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (from 0) of `steps`: linear warm-up, then decay towards 0."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
    raise LearningError(f"schedule {config.schedule!r} is unknown: use linear or cosine")


# --------------------------------------------------------------------------- checkpoints


def save_checkpoint(engine: Any, directory: Place, step: int, plan: str, history: Mapping[str, Any]) -> None:
    """Write what training needs to go on after `step` steps; called by all workers.

    Every worker writes its share beside; once all have, the first publishes, and removes the checkpoint before. A
    checkpoint under its final name is therefore whole. `history` is kept with it. Where `directory` is in an object
    store, each node writes to its own disk, and the workers of a node share the upload of what lies there.
    """
    target = directory / f"checkpoint-{step}"
    aside = workshop(directory) / f".checkpoint-{step}"
    share, shares = _share_of_disk(directory)
    if share == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(aside), tag="state", save_latest=False)
    if dist.get_rank() == 0:
        (aside / "history.json").write_text(json.dumps(history))
    dist.barrier()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, put_share(aside, files_below(aside)[share::shares], target))
    if dist.get_rank() == 0:
        files = {name: identity for part in parts for name, identity in part.items()}
        digests = {name: digest for name, (_, digest) in files.items()}
        meta = {"step": step, "plan": plan, "workers": dist.get_world_size(), "files": digests}
        (aside / "meta.json").write_text(json.dumps(meta))
        publish_shares(aside, files | put_share(aside, ["meta.json"], target), target)
        discard_checkpoints(directory, but=step)
    dist.barrier()
    if share == 0:
        shutil.rmtree(aside, ignore_errors=True)


def _share_of_disk(directory: Place) -> tuple[int, int]:
    """Which of the workers that write to the same disk for `directory` this one is (from 0), and how many they are."""
    disk = ""
    if isinstance(directory, RemotePath):
        place = workshop(directory)
        place.mkdir(parents=True, exist_ok=True)
        found = place.stat()
        disk = f"{socket.gethostname()} {found.st_dev} {found.st_ino}"
    disks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(disks, disk)
    return disks[: dist.get_rank()].count(disk), disks.count(disk)


def load_checkpoint(engine: Any, directory: Place, step: int) -> dict[str, Any]:
    """Continue from the checkpoint made after `step` steps; returns the `history` kept with it."""
    path = local_directory(directory / f"checkpoint-{step}")
    loaded, _ = engine.load_checkpoint(str(path), tag="state")
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load its checkpoint {path}")
    history: dict[str, Any] = json.loads((path / "history.json").read_text())
    return history


# --------------------------------------------------------------------------- the result


def consolidated(engine: Any, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights, on the CPU of the first worker (elsewhere an empty dict). Called by all workers."""
    weights: dict[str, torch.Tensor] = {}
    first = dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        gathered = [parameter] if engine.zero_optimization_stage() == 3 else []
        with deepspeed.zero.GatheredParameters(gathered):
            if first:
                weights[name] = parameter.detach().cpu().clone().contiguous()
    if first:
        persistent = set(model.state_dict().keys())
        for name, buffer in model.named_buffers():
            if name in persistent:
                weights[name] = buffer.detach().cpu().clone()
    return weights


def write_model(model: PreTrainedModel, weights: dict[str, torch.Tensor], initial: Path, aside: Path) -> None:
    """A standard checkpoint directory: config, safetensors, and the tokenizer files of `initial`."""
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=weights)
    for pattern in _COPIED:
        for file in initial.glob(pattern):
            shutil.copy2(file, aside / file.name)


def device() -> torch.device:
    """Where this worker computes."""
    return torch.device(get_accelerator().current_device_name())
