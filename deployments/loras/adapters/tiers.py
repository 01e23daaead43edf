"""Adapters in one kind of memory, within a budget of bytes: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TypeAlias

from cluster.metrics import Meter
from deployments.loras.adapters.packed import Packed
from deployments.loras.sources.lora_root import LoraFile

Key: TypeAlias = tuple[str, str | None]
"""A file's sha256, and the expert that it is for."""


def key_of(file: LoraFile) -> Key:
    """Return what names the adapter of a file, whatever its path."""
    return file.sha256, file.expert


class Tier:
    """Adapters by their keys, counted by `meter`. For one thread at a time."""

    def __init__(self, budget: int, meter: Meter) -> None:
        self._budget = budget
        self._meter = meter
        self._held: OrderedDict[Key, Packed] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    @property
    def room(self) -> int:
        """Bytes that the budget has left."""
        return max(self._budget - self._bytes, 0)

    @property
    def hashes(self) -> frozenset[str]:
        """The sha256 of each adapter here."""
        return frozenset(sha256 for sha256, _ in self._held)

    def find(self, key: Key) -> Packed | None:
        """Look an adapter up; it is the most recently used one then."""
        packed = self._held.get(key)
        self._meter.looked_up(hit=packed is not None)
        if packed is not None:
            self._held.move_to_end(key)
        return packed

    def add(self, key: Key, packed: Packed) -> None:
        """Hold one more adapter, beyond the budget if need be: `make_room` keeps to that."""
        self._held[key] = packed
        self._hold(self._bytes + packed.bytes)

    def make_room(self, size: int, in_use: Collection[Key]) -> None:
        """Drop least recently used adapters until `size` bytes fit into the budget; never one in use."""
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
