"""The key dialects of LoRA files: what each tensor is, by its name, and which files are refused.

A tensor's name is a module's name (the stem) and a suffix for its role. The suffix shows the dialect.
`layer_names` finds the layers of a stem. This module needs only the header, so a file is refused before any
weight is read. Imports no torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from deployments.loras.format.header import Header, shorten, unsupported

T = TypeVar("T")

MAX_RANK = 1024
"""Far above what trainers write. A larger rank only costs memory."""


class Role(StrEnum):
    """What a tensor is to its module. LoKr factors are stored whole (`W1`) or as products (`W1_A @ W1_B`)."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    W1 = "lokr_w1"
    W1_A = "lokr_w1_a"
    W1_B = "lokr_w1_b"
    W2 = "lokr_w2"
    W2_A = "lokr_w2_a"
    W2_B = "lokr_w2_b"


class Dialect(StrEnum):
    """How a file names its tensors."""

    PEFT = "peft"
    KOHYA = "kohya"
    LOKR = "lokr"


_LORA = r"(\.lora_|[._]lora\.|\.lora_linear_layer\.|(?<=_lora[12])\.)"
"""What precedes `down` and `up`: in kohya's files, diffusers' before peft (two forms), XLabs'."""

_SUFFIXES: tuple[tuple[re.Pattern[str], Role, Dialect | None], ...] = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$"), Role.DOWN, Dialect.PEFT),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), Role.UP, Dialect.PEFT),
    (re.compile(rf"{_LORA}down\.weight$"), Role.DOWN, Dialect.KOHYA),
    (re.compile(rf"{_LORA}up\.weight$"), Role.UP, Dialect.KOHYA),
    (re.compile(r"\.alpha$"), Role.ALPHA, None),
    *(
        (re.compile(rf"\.{role}$"), role, Dialect.LOKR)
        for role in (Role.W1, Role.W1_A, Role.W1_B, Role.W2, Role.W2_A, Role.W2_B)
    ),
)

_RANK_AXIS = {Role.DOWN: 0, Role.UP: 1, Role.W1_A: 1, Role.W1_B: 0, Role.W2_A: 1, Role.W2_B: 0}
"""The axis of each tensor that is the rank."""

_UNSUPPORTED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.magnitude$|\.dora_scale$|\.lora_magnitude_vector"), "is a DoRA, which is not supported"),
    (re.compile(r"\.hada_[wt]"), "is a LoHa, which is not supported"),
    (re.compile(r"\.lokr_t2$|\.lora_mid\.weight$"), "has Tucker factors, which are not supported"),
    (re.compile(r"\.oft_|\.boft_"), "is an OFT, which is not supported"),
    (re.compile(r"\.diff(_b)?$"), "also changes whole layers (`.diff`), which is not supported"),
)


def split(name: str) -> tuple[str, Role, Dialect | None] | None:
    """Split a tensor's name into stem, role and dialect. None if it is not a LoRA tensor.

    The dialect is None for alpha, which several dialects share.
    """
    for suffix, role, dialect in _SUFFIXES:
        if match := suffix.search(name):
            return name[: match.start()], role, dialect
    return None


def dialect_of(header: Header) -> Dialect:
    """Return the dialect of a file; of several, the last by name.

    Every tensor must be recognized, since ignoring a part of the file would render a wrong image. The rank is
    at most `MAX_RANK`. Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a file that is not supported.
    """
    found: set[Dialect] = set()
    unknown: list[str] = []
    for name, tensor in header.tensors.items():
        parts = split(name)
        if parts is None:
            unknown.append(name)
        elif parts[2]:
            found.add(parts[2])
            axis = _RANK_AXIS.get(parts[1], 0)
            if parts[1] in _RANK_AXIS and tensor.shape[axis : axis + 1] > (MAX_RANK,):
                raise unsupported(f"has rank {tensor.shape[axis]}; at most {MAX_RANK} is allowed")
    for pattern, reason in _UNSUPPORTED:
        if any(pattern.search(name) for name in unknown):
            raise unsupported(reason)
    if not found:
        example = f", but for example {shorten(unknown[0])}" if unknown else ""
        raise unsupported(f"has no LoRA tensors{example}")
    if unknown:
        raise unsupported(f"has tensors that are not part of a LoRA, for example {shorten(unknown[0])}")
    return max(found)


def group(tensors: Mapping[str, T]) -> dict[str, dict[Role, T]]:
    """Group tensors by stem and role. Every name must be one that `dialect_of` accepts."""
    stems: defaultdict[str, dict[Role, T]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts = split(name)
        if parts is None or parts[1] in stems[parts[0]]:
            raise unsupported(f"has a duplicate or unknown tensor: {shorten(name)}")
        stems[parts[0]][parts[1]] = tensor
    return dict(stems)
