"""Copies adapters to the device ahead of their job, on a separate stream while another job computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deployments.loras.adapters.memory_tier import Key
from deployments.loras.adapters.packed_adapter import Packed


class Staging:
    """Device copies that are in no tier yet. Thread-safe. No-op on the CPU: nothing to overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._copies: dict[Key, tuple[Packed, torch.cuda.Event]] = {}

    @contextmanager
    def hold(self, key: Key, packed: Packed, room: int) -> Iterator[None]:
        """Start to copy an adapter if it and the other copies fit into `room` bytes.

        The copy is dropped when the block ends, unless it was taken. If the device runs out of memory, there
        is no copy and no error.
        """
        copy = self._begin(packed) if self._stream and self._bytes + packed.bytes <= room else None
        if copy:
            with self._lock:
                self._copies[key] = copy
        try:
            yield
        finally:
            with self._lock:
                if copy and self._copies.get(key) is copy:
                    del self._copies[key]

    def take(self, key: Key) -> Packed | None:
        """Return the copy of an adapter, or None. Kernels of the current stream wait until it is complete."""
        with self._lock:
            staged = self._copies.pop(key, None)
        if staged is None:
            return None
        packed, copied = staged
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        # The memory belongs to the copy stream, which must not reuse it before this stream's kernels end.
        packed.buffer.record_stream(stream)
        return packed

    def clear(self) -> None:
        """Drop every copy."""
        with self._lock:
            self._copies.clear()

    @property
    def _bytes(self) -> int:
        with self._lock:
            return sum(packed.bytes for packed, _ in self._copies.values())

    def _begin(self, packed: Packed) -> tuple[Packed, torch.cuda.Event] | None:
        try:
            with torch.cuda.stream(self._stream):
                copy = packed.copy(self._device)
                copied = torch.cuda.Event()
                copied.record()
        except torch.OutOfMemoryError:
            return None
        return copy, copied
