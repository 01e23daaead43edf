"""The host tier: converted adapters in host memory, one transfer away from the device.

Several threads share it: the rendering thread, and those that preload adapters for upcoming jobs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from cluster.metrics import Meter
from deployments.loras.adapters.memory_tier import Key, Tier, key_of
from deployments.loras.adapters.packed_adapter import Packed
from deployments.loras.sources.lora_file import LoraFile


class _Flight:
    """A lock shared by all threads that want the same adapter."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class HostTier:
    """Adapters of one pipeline in host memory, within `budget` bytes. Thread-safe.

    If several threads want the same adapter, one converts it with `convert` and the others wait. Different
    adapters are converted in parallel. Adapters in use are never dropped, so they may exceed the budget.
    """

    def __init__(self, convert: Callable[[LoraFile], Packed], budget: int) -> None:
        self._convert = convert
        self.meter = Meter("host")
        self._disk = Meter("disk")
        self._tier = Tier(budget, self.meter)
        self._lock = threading.Lock()
        self._users: Counter[Key] = Counter()
        self._flights: WeakValueDictionary[Key, _Flight] = WeakValueDictionary()

    @property
    def hashes(self) -> frozenset[str]:
        """The sha256 of each adapter in this tier."""
        with self._lock:
            return self._tier.hashes

    @contextmanager
    def use(self, file: LoraFile) -> Iterator[Packed]:
        """Yield the adapter of a file, converting it if necessary. It stays here until the block ends.

        The file of an adapter that is already here is not read. Blocks while another thread converts the same
        file. Raises `JobFailure` as `Converter` does, and then nothing has changed.
        """
        key = key_of(file)
        with self._lock:
            self._users[key] += 1
            flight = self._flights.setdefault(key, _Flight())
        try:
            with flight.lock:
                packed = self._find(key) or self._load(key, file)
            yield packed
        finally:
            with self._lock:
                self._users -= Counter([key])
                self._tier.make_room(0, self._users)

    def _find(self, key: Key) -> Packed | None:
        with self._lock:
            return self._tier.find(key)

    def _load(self, key: Key, file: LoraFile) -> Packed:
        started = time.perf_counter()
        packed = self._convert(file)
        self._disk.read(file.bytes, time.perf_counter() - started)
        with self._lock:
            self._tier.make_room(packed.bytes, self._users)
            self._tier.add(key, packed)
        return packed
