"""Adapters in one kind of memory, within a byte budget. The least recently used are dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TypeAlias

from cluster.metrics import Meter
from deployments.loras.adapters.packed_adapter import Packed
from deployments.loras.sources.lora_file import LoraFile

Key: TypeAlias = tuple[str, str | None]
"""A file's sha256, and the transformer that it is for, if the model has two."""


def key_of(file: LoraFile) -> Key:
    """Return the key of a file's adapter. It does not depend on the path."""
    return file.sha256, file.expert


class Tier:
    """Adapters by key, counted by `meter`. Not thread-safe."""

    def __init__(self, budget: int, meter: Meter) -> None:
        self._budget = budget
        self._meter = meter
        self._held: OrderedDict[Key, Packed] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    @property
    def room(self) -> int:
        """Bytes left in the budget."""
        return max(self._budget - self._bytes, 0)

    @property
    def hashes(self) -> frozenset[str]:
        """The sha256 of each adapter in this tier."""
        return frozenset(sha256 for sha256, _ in self._held)

    def find(self, key: Key) -> Packed | None:
        """Return an adapter, or None, and mark it as the most recently used."""
        packed = self._held.get(key)
        self._meter.looked_up(hit=packed is not None)
        if packed is not None:
            self._held.move_to_end(key)
        return packed

    def add(self, key: Key, packed: Packed) -> None:
        """Add an adapter, even beyond the budget. Only `make_room` enforces the budget."""
        self._held[key] = packed
        self._hold(self._bytes + packed.bytes)

    def make_room(self, size: int, in_use: Collection[Key]) -> None:
        """Drop the least recently used adapters, none in use, until `size` bytes fit into the budget."""
        for key in list(self._held):
            if self._bytes + size <= self._budget:
                break
            if key not in in_use:
                self._hold(self._bytes - self._held.pop(key).bytes)

    def clear(self) -> None:
        """Drop every adapter."""
        self._held.clear()
        self._hold(0)

    def _hold(self, size: int) -> None:
        self._bytes = size
        self._meter.holds(size)
