"""A LoRA file on this node, named by the sha256 of its content. Imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from deployments.loras.format.peft_folder import config_beside


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file on this node: `sha256` (hex) identifies its content, `bytes` is its size.

    For a PEFT folder, the hash covers the weights and then the configuration. `expert` says which transformer
    the file is for, if the model has two.
    """

    path: Path
    sha256: str
    bytes: int
    expert: Literal["low", "high"] | None = None


def digest(path: Path) -> str:
    """Return the sha256 (hex) of a LoRA, cached while device, inode, size and mtime are the same."""
    config = config_beside(path)
    return _digest(*(_Version.of(file) for file in ((path, config) if config else (path,))))


@dataclass(frozen=True, slots=True)
class _Version:
    """Identifies the content of a file without reading it."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> _Version:
        status = path.stat()
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=65_536)
def _digest(*versions: _Version) -> str:
    whole = hashlib.sha256()
    for version in versions:
        with version.path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest()
