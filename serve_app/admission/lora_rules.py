"""Checks the LoRAs of a request: their number, transformer and source, and the headers of local files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from cluster.failures import JobFailure
from cluster.net.urls import parse_hosts
from deployments.catalog import ModelSpec
from deployments.loras.format.file_modules import judge
from deployments.loras.format.header import read_header
from deployments.loras.sources.lora_root import resolve
from deployments.spec.lora_reference import LoraReference, LoraReferenceError, RootFile, check, parse
from serve_app.settings import Settings
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import InferenceRequest

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
"""Start of a URL with any scheme."""


def check_loras(request: InferenceRequest, model: ModelSpec, settings: Settings) -> list[LoraReference]:
    """Return the parsed reference of each LoRA. Raises `Refusal`."""
    if not request.loras:
        raise _lora_refusal(Code.LORA_FILE_REQUIRED, request)
    experts = Counter(lora.transformer for lora in request.loras)
    if model.experts and None in experts:
        raise _lora_refusal(Code.MOE_FORMAT_REQUIRED, request)
    if not model.experts and set(experts) != {None}:
        raise _lora_refusal(Code.MOE_FORMAT_NOT_SUPPORTED, request)
    most = settings.max_loras.get(model.id, 1)
    if max(experts.values()) > most:
        single = Code.SINGLE_MOE_CONFIG_ONLY if model.experts else Code.SINGLE_LORA_ONLY
        raise _lora_refusal(single if most == 1 else Code.TOO_MANY_LORAS, request)
    return _check_files(request, model, settings)


@contextmanager
def refused_lora(reference: str) -> Iterator[None]:
    """Convert errors of the LoRA at `reference` into a `Refusal` that reveals no secrets."""
    try:
        yield
    except (LoraReferenceError, JobFailure) as error:
        raise Refusal(Code[error.code], lora_path=_shown(reference), reason=str(error)) from error
    except OSError as error:
        reason = "The file cannot be read."
        raise Refusal(Code.LORA_NOT_FOUND, lora_path=_shown(reference), reason=reason) from error


def _lora_refusal(code: Code, request: InferenceRequest) -> Refusal:
    fields = {"path", "transformer", "network_multiplier"}
    return Refusal(
        code, loras=[lora.model_dump(include=fields) | {"path": _shown(lora.path)} for lora in request.loras]
    )


def _shown(path: str) -> str:
    """Return `path` as an error may show it: only the scheme of a URL, because the rest may be secret."""
    url = URL.match(path)
    return f"{url[0]}***" if url else path


def _check_files(request: InferenceRequest, model: ModelSpec, settings: Settings) -> list[LoraReference]:
    references, missing = [], []
    for lora in request.loras:
        try:
            with refused_lora(lora.path):
                references.append(_check_file(lora.path, settings))
        except Refusal as refusal:
            if refusal.code != Code.LORA_NOT_FOUND.name or not model.experts:
                raise
            missing.append(_shown(lora.path))
    if missing:
        raise Refusal(Code.LORA_NOT_FOUND, missing_files=missing)
    return references


def _check_file(path: str, settings: Settings) -> LoraReference:
    reference = parse(path)
    if isinstance(reference, RootFile):
        file = resolve(settings.loras, path)
        status = file.stat()
        _check_header(file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    else:
        check(reference, parse_hosts(settings.fetch_hosts), settings.fetch_buckets)
    return reference


@lru_cache(maxsize=65_536)
def _check_header(file: Path, _device: int, _inode: int, _size: int, _mtime_ns: int) -> None:
    """Check a LoRA's header. This takes milliseconds, so the result is cached until the file changes."""
    judge(read_header(file))
