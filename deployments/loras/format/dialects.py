"""The key formats of LoRA files: what each tensor is by its name, and which files cannot be served.

A name is a module's name (`stem`) and a suffix that gives the tensor's role. The suffixes tell the dialects
apart; how a stem finds its module is `targets`' concern. Everything here works on names alone, so that a file
is refused from its header, before any weight is read. Imports no torch.
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
"""Far above what trainers make; a larger one only costs memory."""


class Role(StrEnum):
    """What a tensor is to its module. LoKr factors are whole (`W1`) or a product (`W1_A @ W1_B`)."""

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
"""Before `down` and `up`: of kohya, of diffusers until peft (two forms), of XLabs."""

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
"""Which axis of a tensor is the rank."""

_UNSUPPORTED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.magnitude$|\.dora_scale$|\.lora_magnitude_vector"), "is a DoRA, which is not supported"),
    (re.compile(r"\.hada_[wt]"), "is a LoHa, which is not supported"),
    (re.compile(r"\.lokr_t2$|\.lora_mid\.weight$"), "has Tucker factors, which are not supported"),
    (re.compile(r"\.oft_|\.boft_"), "is an OFT, which is not supported"),
    (re.compile(r"\.diff(_b)?$"), "changes whole layers (`.diff`) beside its LoRA, which is not supported"),
)


def split(name: str) -> tuple[str, Role, Dialect | None] | None:
    """Split a tensor's name into stem, role and dialect (none for alpha, which several share)."""
    for suffix, role, dialect in _SUFFIXES:
        if match := suffix.search(name):
            return name[: match.start()], role, dialect
    return None


def dialect_of(header: Header) -> Dialect:
    """Return the dialect of a file.

    Every tensor has to be understood: a file of which a part is ignored would render a picture that is wrong.
    No rank may be above `MAX_RANK`. Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a file that is not
    served.
    """
    found: set[Dialect] = set()
    strange: list[str] = []
    for name, tensor in header.tensors.items():
        parts = split(name)
        if parts is None:
            strange.append(name)
        elif parts[2]:
            found.add(parts[2])
            axis = _RANK_AXIS.get(parts[1], 0)
            if parts[1] in _RANK_AXIS and tensor.shape[axis : axis + 1] > (MAX_RANK,):
                raise unsupported(f"has rank {tensor.shape[axis]}; at most {MAX_RANK} is allowed")
    for pattern, reason in _UNSUPPORTED:
        if any(pattern.search(name) for name in strange):
            raise unsupported(reason)
    if not found:
        example = f", but for example {shorten(strange[0])}" if strange else ""
        raise unsupported(f"holds no LoRA tensors{example}")
    if strange:
        raise unsupported(f"holds tensors that are no part of a LoRA, for example {shorten(strange[0])}")
    return max(found)


def group(tensors: Mapping[str, T]) -> dict[str, dict[Role, T]]:
    """Gather tensors by stem and role; every name must be one that `dialect_of` accepts."""
    stems: defaultdict[str, dict[Role, T]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts = split(name)
        if parts is None or parts[1] in stems[parts[0]]:
            raise unsupported(f"holds a tensor that cannot be placed: {shorten(name)}")
        stems[parts[0]][parts[1]] = tensor
    return dict(stems)
