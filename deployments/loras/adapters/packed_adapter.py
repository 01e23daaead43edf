"""Adapters whose weights share one buffer, so that a device copy is one allocation and one transfer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deployments.loras.adapters.layer_deltas import Delta

LayerName: TypeAlias = tuple[str, str]
"""A component of a pipeline, and the dotted path of a layer in it."""

_ALIGNMENT = 64
"""Bytes, as torch aligns tensors on the CPU. No kernel needs more."""

_HUGE_PAGE = 2 * 2**20
"""Bytes, on x86-64 and most of arm64."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An adapter: a delta for each layer it changes, and a warning if modules of its file match no layer.

    The deltas' tensors are views into `buffer` (uint8), which is never written after `pack`.
    """

    buffer: Tensor
    deltas: Mapping[LayerName, Delta]
    warning: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the buffer in memory. Pinned memory is allocated in powers of two."""
        size = self.buffer.nbytes
        return 1 << (size - 1).bit_length() if self.buffer.is_pinned() else size

    def copy(self, device: torch.device) -> Packed:
        """Copy it to a device. From a pinned buffer the copy is asynchronous, on the current stream."""
        buffer = _empty(self.buffer.nbytes, device).copy_(self.buffer, non_blocking=True)
        typed: dict[torch.dtype, Tensor] = {}

        def view(tensor: Tensor) -> Tensor:
            if tensor.dtype not in typed:
                typed[tensor.dtype] = buffer.view(tensor.dtype)
            return typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        deltas = {
            name: delta.replaced([view(tensor) for tensor in delta.tensors])
            for name, delta in self.deltas.items()
        }
        return Packed(buffer, deltas, self.warning)


def pack(
    deltas: Mapping[LayerName, Delta],
    dtypes: Mapping[LayerName, torch.dtype],
    warning: str | None = None,
    *,
    pinned: bool,
) -> Packed:
    """Copy deltas into one buffer in host memory, each in the dtype of its layer.

    A tensor that several deltas share is stored once per dtype. `pinned` needs CUDA.
    """
    starts: dict[tuple[int, torch.dtype], int] = {}
    size = 0
    for name, delta in deltas.items():
        for tensor in delta.tensors:
            key = id(tensor), dtypes[name]
            if key not in starts:
                starts[key] = size
                size += _aligned(tensor.numel() * dtypes[name].itemsize)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    typed = {dtype: buffer.view(dtype) for dtype in {dtypes[name] for name in deltas}}
    views = {}

    def place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        key = id(tensor), dtype
        if key not in views:
            start = starts[key] // dtype.itemsize
            views[key] = typed[dtype][start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        return views[key]

    packed = {
        name: delta.replaced([place(tensor, dtypes[name]) for tensor in delta.tensors])
        for name, delta in deltas.items()
    }
    return Packed(buffer, packed, warning)


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _empty(size: int, device: torch.device) -> Tensor:
    """Allocate `size` bytes (uint8) on a device.

    On the CPU this uses huge pages, since the page faults of small ones take several times as long as the
    copy.
    """
    if device.type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
