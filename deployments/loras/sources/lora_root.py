"""Resolves a request's LoRA path to a file below the LoRA root, never outside it. Imports no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from deployments.loras.format.peft_folder import CONFIG, WEIGHTS
from deployments.loras.sources.lora_file import LoraFile, digest
from deployments.spec.lora_reference import SUFFIX, LoraNotSafetensors, LoraReferenceError


class LoraPathNotAllowed(LoraReferenceError):
    """The path leaves the LoRA root. The message does not reveal what is there."""

    code = "LORA_PATH_NOT_ALLOWED"


class LoraNotFound(LoraReferenceError):
    """Nothing is at the path."""

    code = "LORA_NOT_FOUND"


def resolve(root: Path, reference: str) -> Path:
    """Resolve a request's LoRA path to a regular `.safetensors` file inside `root`.

    Returns a real path. For a PEFT folder it is that of the weights, below the folder's real path. Raises
    `LoraPathNotAllowed` if the path leaves the root by its text (also percent-encoded, once or repeatedly)
    or through links, `LoraNotFound` if nothing is there, and `LoraNotSafetensors` for anything else.
    """
    if any(_leaves(root, form) for form in _decodings(reference)):
        raise _not_allowed()
    try:
        path = _real(root, root / reference)
        if path.is_dir() and all(_real(root, path / name).is_file() for name in (WEIGHTS, CONFIG)):
            return path / WEIGHTS
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        # ValueError: lone surrogates, which no file name can hold.
        raise LoraNotFound("The LoRA file does not exist.") from error
    if not stat.S_ISREG(mode) or not reference.lower().endswith(SUFFIX):
        raise LoraNotSafetensors(f"The LoRA must be a regular {SUFFIX} file or a PEFT folder.")
    return path


def open_lora(root: Path, reference: str) -> LoraFile:
    """Resolve a reference and hash its content. An unchanged file is not read again.

    Raises as `resolve`.
    """
    path = resolve(root, reference)
    try:
        return LoraFile(path, digest(path), path.stat().st_size)
    except OSError as error:
        raise LoraNotFound("The LoRA file cannot be read.") from error


def _real(root: Path, path: Path) -> Path:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise _not_allowed()
    return real


def _decodings(reference: str) -> Iterator[str]:
    """Yield the text, then its percent-decodings until nothing changes. Each is shorter, so this ends."""
    yield reference
    while (decoded := unquote(reference)) != reference:
        yield decoded
        reference = decoded


def _leaves(root: Path, text: str) -> bool:
    """Return whether the text of a path leaves the root at any segment, or has a backslash or NUL."""
    if "\0" in text or "\\" in text:
        return True
    if text.startswith("/"):
        bases = (Path(os.path.abspath(root)), Path(os.path.realpath(root)))
        base = next((base for base in bases if Path(text).parts[: len(base.parts)] == base.parts), None)
        if base is None:
            return True
        segments = Path(text).parts[len(base.parts) :]
    else:
        segments = tuple(text.split("/"))
    depth = 0
    for segment in segments:
        depth += {"..": -1, ".": 0, "": 0}.get(segment, 1)
        if depth < 0:
            return True
    return False


def _not_allowed() -> LoraPathNotAllowed:
    return LoraPathNotAllowed("The LoRA path leaves the LoRA directory.")
