"""Cache metrics, counted per process and exported by Ray to Prometheus."""

from __future__ import annotations

import threading

from ray.util.metrics import Counter, Gauge

_LOOKUPS = Counter("lora_tier_lookups", "Lookups of LoRAs, by tier and result", ("tier", "result"))
_BYTES = Counter("lora_tier_read_bytes", "Bytes of LoRAs read from a tier into the next", ("tier",))
_SECONDS = Counter("lora_tier_read_seconds", "Seconds spent on these reads", ("tier",))
_HELD = Gauge("lora_tier_held_bytes", "Bytes of LoRAs that a tier holds", ("tier",))


class Meter:
    """Counts for one tier of LoRAs ("device", "host", "disk", "origin") in this process. Thread-safe.

    Ray exports them as `ray_lora_tier_*` with the tag `tier`. Without Ray they are only kept here.
    """

    def __init__(self, tier: str) -> None:
        self._tags = {"tier": tier}
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        self.read_bytes = 0
        self.read_seconds = 0.0

    def looked_up(self, *, hit: bool) -> None:
        """Count a lookup."""
        with self._lock:
            if hit:
                self.hits += 1
            else:
                self.misses += 1
        _LOOKUPS.inc(1, self._tags | {"result": "hit" if hit else "miss"})

    def read(self, size: int, seconds: float) -> None:
        """Count `size` bytes of a file or adapter that took `seconds` to get from this tier to the next."""
        with self._lock:
            self.read_bytes += size
            self.read_seconds += seconds
        if size > 0:  # Ray's counters reject 0.
            _BYTES.inc(size, self._tags)
            _SECONDS.inc(max(seconds, 1e-9), self._tags)

    def holds(self, size: int) -> None:
        """Set how many bytes the tier holds."""
        _HELD.set(size, self._tags)
