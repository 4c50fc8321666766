"""The identity of a checkpoint directory: one digest over what decides a model's behaviour."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from evolve.errors import EvolveError
from evolve.files import Place, local_directory, place
from evolve.remote import RemotePath, is_uri

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


def digest(path: str | Place) -> str:
    """sha256 (hexadecimal) over the names and contents of a checkpoint's weights, configuration and
    tokenizer files, in the order of their names.

    Files that do not decide the model's behaviour (optimizer state, README, logs) are left out. The
    digest of each file is kept by (path, size, modification time, inode), so asking again is cheap. In an object store
    the digests are those that the files were put with; whoever fetches them compares.

    Raises:
        FileNotFoundError: `path` is no directory, or holds no safetensors file.
    """
    directory = place(path)
    if isinstance(directory, RemotePath):
        return _digest_of({name: bytes.fromhex(sha256) for name, (_, sha256) in directory.published().items()}, path)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint {directory}: no such directory")
    return _digest_of({file.name: _known_digest(file) for file in files_of(directory)}, path)


def files_of(directory: str | Path) -> list[Path]:
    """The files that decide how the model of a directory behaves."""
    directory = Path(directory)
    settings = {directory / name for name in SETTINGS if (directory / name).is_file()}
    return sorted({file for pattern in WEIGHTS for file in directory.glob(pattern)} | settings)


def _digest_of(files: Mapping[str, bytes], path: str | Place) -> str:
    """The digest of a checkpoint from the digests of its files."""
    weights = [name for name in files if any(fnmatchcase(name, pattern) for pattern in WEIGHTS)]
    if not weights:
        raise FileNotFoundError(f"checkpoint {path}: no *.safetensors file; save the model with save_pretrained()")
    total = hashlib.sha256()
    for name in sorted({*weights, *(name for name in files if name in SETTINGS)}):
        total.update(f"{name}\0".encode())
        total.update(files[name])
    return total.hexdigest()


def resolve(model: str, revision: str | None = None) -> str:
    """The local directory of a model: a directory as it is; what was published in an object store, and a hub name,
    after download (cached).

    Raises:
        FileNotFoundError: it looks like a path, but no such directory exists.
    """
    if is_uri(model):
        return str(local_directory(place(model)))
    if Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"checkpoint {model}: no such directory")
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=revision, allow_patterns=[*WEIGHTS, *SETTINGS])


def verify(path: str | Place, expected: str | None) -> str:
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


def _known_digest(file: Path) -> bytes:
    stat = file.stat()
    return _file_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, modified_ns: int, inode: int) -> bytes:
    """sha256 of one file; size, time and inode only tell versions of the file apart."""
    content = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.digest()
