"""Reads the header of a safetensors file: names, dtypes, shapes and metadata, without the weights.

A file starts with an unsigned 64-bit little-endian length, followed by that many bytes of JSON, followed by
the tensors (https://github.com/huggingface/safetensors#format). Every entry of the header is checked against
the file, so a file that passes can be loaded. Imports no torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from cluster.failures import FailureCode, JobFailure
from deployments.loras.format.peft_folder import METADATA, config_beside

MAX_HEADER_BYTES = 10_000_000
"""Ten times the header of the largest LoRA seen: 2,400 modules of three tensors, about 150 bytes each."""

MAX_TENSORS = 65_536

LENGTH_BYTES = 8
"""Size of the length field before the header."""

_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_OTHER_FORMATS: Mapping[bytes, str] = {
    b"PK": "a zip archive, like a pickled checkpoint",
    b"\x80": "a pickle",
    b"<": "a web page",
    b"GGUF": "a GGUF file",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it.

    `dtype` is safetensors' own name, such as `BF16`. `begin` is the tensor's offset in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and its metadata: any strings."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def unsupported(reason: str) -> JobFailure:
    """Build the failure for a file that is not a usable LoRA. `reason` continues "The LoRA file"."""
    return JobFailure(FailureCode.LORA_FORMAT_NOT_SUPPORTED, f"The LoRA file {reason}.")


def read_header(path: Path) -> Header:
    """Read and check the header of `path`. peft's configuration file next to it counts as metadata.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for anything but an intact safetensors file, and `OSError`
    if the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = header_bytes(file.read(LENGTH_BYTES))
        header = parse_header(file.read(length), length, size)
    if config := config_beside(path):
        text = config.read_text(errors="replace")
        return replace(header, metadata={**header.metadata, METADATA: text})
    return header


def header_bytes(start: bytes) -> int:
    """Return the header's length from the first `LENGTH_BYTES` of a file. Raises as `read_header`."""
    if not start:
        raise unsupported("is empty")
    length = int.from_bytes(start, "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        kind = next((kind for magic, kind in _OTHER_FORMATS.items() if start.startswith(magic)), None)
        raise unsupported(f"is not safetensors but {kind}" if kind else "is not safetensors")
    return length


def parse_header(text: bytes, length: int, size: int | None) -> Header:
    """Parse a header of `length` bytes. `size` is that of the file, if known. Raises as `read_header`."""
    if len(text) < length:
        raise unsupported("is truncated: it ends within its header")
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise unsupported("has a header that is not valid JSON") from error
    if not isinstance(entries, dict):
        raise unsupported("has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise unsupported("has metadata values that are not strings")
    if len(entries) > MAX_TENSORS:
        raise unsupported(f"has {len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    start = LENGTH_BYTES + length
    spans, tensors = [], {}
    for name, entry in entries.items():
        tensors[name], span = _tensor(name, entry, start)
        spans.append(span)
    _check_spans(sorted(spans), None if size is None else size - start)
    return Header(tensors, metadata)


def read_number(file: BinaryIO, tensor: TensorInfo) -> float | None:
    """Return the value of a tensor of one element. None for a dtype that `struct` cannot read."""
    file.seek(tensor.begin)
    data = file.read(_ITEM_BYTES[tensor.dtype])
    if tensor.dtype == "BF16":
        data, form = b"\0\0" + data, "<f"  # The upper half of a float32.
    else:
        form = {"F64": "<d", "F32": "<f", "F16": "<e"}.get(tensor.dtype, "")
    return struct.unpack(form, data)[0] if form else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("duplicate key")
    return entries


def _tensor(name: str, entry: object, start: int) -> tuple[TensorInfo, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            valid = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if valid and dtype in _ITEM_BYTES and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]:
                return TensorInfo(dtype, tuple(shape), start + begin), (begin, end)
    raise unsupported(f"has an invalid entry for tensor {shorten(name)}")


def _check_spans(spans: list[tuple[int, int]], data_bytes: int | None) -> None:
    """Check for gaps and overlaps, and that the tensors fill the data section if its size is known."""
    position = 0
    for begin, end in spans:
        if begin != position:
            raise unsupported("has tensors that overlap or leave gaps")
        position = end
    if data_bytes is None:
        return
    if position > data_bytes:
        raise unsupported("is truncated: it ends within its tensors")
    if position < data_bytes:
        raise unsupported("has bytes after its last tensor")


def shorten(name: str, limit: int = 120) -> str:
    """Quote a tensor's name for a message. Names come from the uploader and may have any length."""
    return repr(name if len(name) <= limit else f"{name[:limit]}...")
