"""Adapters on their way to the device: copied on a stream of their own while a job computes on another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deployments.loras.adapters.packed import Packed
from deployments.loras.adapters.tiers import Key


class Staging:
    """Copies that no tier holds yet; thread-safe. Without CUDA there is nothing to hide, and no copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._copies: dict[Key, tuple[Packed, torch.cuda.Event]] = {}

    @contextmanager
    def hold(self, key: Key, packed: Packed, room: int) -> Iterator[None]:
        """Begin to copy an adapter if `room` bytes take it and the other copies; drop it when the block ends.

        It stays if it was taken. A device without memory for it gets none: that is no error.
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
        """Return the copy of an adapter, for kernels of the current stream to use: they wait for its end."""
        with self._lock:
            staged = self._copies.pop(key, None)
        if staged is None:
            return None
        packed, copied = staged
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        # Allocated for the other stream, which may have the memory again only after this one's kernels.
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
