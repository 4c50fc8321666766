"""The identity of a checkpoint directory: one digest over what decides a model's behaviour."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from evolve.errors import EvolveError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_CHUNK = 1 << 22


class DigestMismatch(EvolveError):
    """A checkpoint is not the one it was said to be."""


def digest(path: str | Path) -> str:
    """sha256 (hexadecimal) over the names and contents of a checkpoint's weights, configuration and
    tokenizer files, in the order of their names.

    Files that do not decide the model's behaviour (optimizer state, README, logs) are left out. The
    digest of each file is kept by (path, size, modification time, inode), so asking again is cheap.

    Raises:
        FileNotFoundError: `path` is no directory, or holds no safetensors file.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint {directory}: no such directory")
    weights = {file for pattern in WEIGHTS for file in directory.glob(pattern)}
    if not weights:
        raise FileNotFoundError(f"checkpoint {directory}: no *.safetensors file; save the model with save_pretrained()")
    settings = {directory / name for name in SETTINGS if (directory / name).is_file()}
    total = hashlib.sha256()
    for file in sorted(weights | settings, key=lambda file: file.name):
        stat = file.stat()
        total.update(f"{file.name}\0".encode())
        total.update(_file_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return total.hexdigest()


def resolve(model: str, revision: str | None = None) -> str:
    """The local directory of a model: a directory as it is, a hub name after download (cached).

    Raises:
        FileNotFoundError: it looks like a path, but no such directory exists.
    """
    if Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"checkpoint {model}: no such directory")
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=revision, allow_patterns=[*WEIGHTS, *SETTINGS])


def verify(path: str | Path, expected: str | None) -> str:
    """The digest of a checkpoint, after checking it against the expected one (None: any).

    Raises:
        FileNotFoundError: as `digest`.
        DigestMismatch: the digests differ.
    """
    found = digest(path)
    if expected is not None and found != expected:
        raise DigestMismatch(
            f"checkpoint {path}: digest {found} is not the expected {expected}. The files changed after "
            "they were published, or the path is another checkpoint's; publish it again."
        )
    return found


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, modified_ns: int, inode: int) -> bytes:
    """sha256 of one file; size, time and inode only tell versions of the file apart."""
    content = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.digest()
