"""How many parameters a model has, from its files, its settings, or its name; no network is used."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from evolve.schema import ToyConfig

UNKNOWN_PARAMETERS = 7e9
"""Assumed of a model that says nothing about its size."""

_MIXTURES = {"deepseek-coder-v2-instruct": (236e9, 21e9), "deepseek-coder-v2-base": (236e9, 21e9)}
"""Parameters and active parameters of models whose names do not tell (arXiv 2406.11931)."""
_TOY_VOCABULARY = 512


@dataclass(frozen=True)
class ModelSize:
    """A model and how many parameters it has."""

    name: str
    parameters: float
    active: float
    """Parameters that take part in one token; fewer than `parameters` in a mixture of experts."""
    source: str
    """Where the numbers are from."""

    @property
    def billions(self) -> str:
        return f"{self.parameters / 1e9:.3g}B" if self.parameters >= 1e8 else f"{self.parameters / 1e6:.2g}M"


def model_size(name: str, toy: ToyConfig) -> ModelSize:
    """The size of a model named as in a configuration: `toy`, a directory, or a hub name."""
    if name == "toy":
        count = _toy_parameters(toy)
        return ModelSize(name, count, count, "from toy.hidden_size and toy.layers")
    directory = Path(name).expanduser()
    if directory.is_dir() and (count := _weights_bytes(directory) / 2):
        return ModelSize(name, count, count, "size of its weight files at 2 bytes a parameter")
    last = name.rstrip("/").rpartition("/")[2].lower()
    if last in _MIXTURES:
        return ModelSize(name, *_MIXTURES[last], "published: all and active parameters")
    match = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", last)
    if match is None:
        return ModelSize(name, UNKNOWN_PARAMETERS, UNKNOWN_PARAMETERS, "assumed: its name tells no size")
    count = float(match[1]) * (1e9 if match[2] == "b" else 1e6)
    active = re.search(r"-a(\d+(?:\.\d+)?)b(?![a-z0-9])", last)
    return ModelSize(name, count, float(active[1]) * 1e9 if active else count, "from its name")


def _weights_bytes(directory: Path) -> int:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size", 0))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _toy_parameters(toy: ToyConfig) -> float:
    """Qwen2 shape: 4 heads, 2 key-value heads, an MLP of 3 times the width, tied embeddings."""
    width = toy.hidden_size
    attention = 3 * width * width
    mlp = 3 * width * 3 * width
    return float(toy.layers * (attention + mlp) + _TOY_VOCABULARY * width)
