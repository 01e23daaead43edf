"""The host tier: converted adapters in host memory, from where a device copy is one transfer.

Several threads share it: the one that renders, and those that prepare adapters of the jobs to come.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from cluster.metrics import Meter
from deployments.loras.adapters.packed import Packed
from deployments.loras.adapters.tiers import Key, Tier, key_of
from deployments.loras.sources.lora_root import LoraFile


class _Flight:
    """A lock that all who wait for one adapter share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class HostTier:
    """Adapters of one pipeline in host memory, of `budget` bytes; thread-safe.

    Of several threads that want one adapter, one converts it with `convert` and the others wait; different
    adapters are converted side by side. One in use is never dropped and may overshoot the budget.
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
        """The sha256 of each adapter here."""
        with self._lock:
            return self._tier.hashes

    @contextmanager
    def use(self, file: LoraFile) -> Iterator[Packed]:
        """Yield the adapter of a file, converted if it is not here; it stays here until the block ends.

        An adapter that is here is taken as it is, without looking at its file. Blocks while another thread
        converts the same one. Raises `JobFailure` as `Converter`, and nothing has changed then.
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
