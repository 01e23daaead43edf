"""The bounds on queued jobs, without a count of the table for every submission."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from cluster.queue import JobQueue
from serve_app.auth import OPEN_TENANT
from serve_app.errors import Code, Refusal
from serve_app.settings import GatewayArgs

COUNT_S = 1.0
"""How long a count stands, in seconds: what other gateways store meanwhile may overshoot a bound."""


@dataclass
class _Count:
    """Queued jobs in all and of one tenant: the table's, plus those that came through this process since."""

    until: float
    queued: int
    own: int


class Backlog:
    """Keeps room in the queue: a count takes as long as the queue is, and a submission must not.

    Jobs that leave the queue make a count too high, never too low, so a bound is reached only by a new one.
    """

    def __init__(self, queue: JobQueue, settings: GatewayArgs) -> None:
        self._queue = queue
        self._settings = settings
        self._counts: dict[str, _Count] = {}
        self._lock = threading.Lock()

    def enter(self, tenant: str) -> Refusal | None:
        """Count one more job of `tenant` in; return its refusal where there is no room. Blocking."""
        with self._lock:
            count = self._counts.get(tenant)
            if count and time.monotonic() < count.until and not self._refusal(tenant, count):
                self._add(tenant)
                return None
        until = time.monotonic() + COUNT_S
        count = _Count(until, *self._queue.waiting(tenant))
        refusal = self._refusal(tenant, count)
        with self._lock:
            self._counts[tenant] = count
            if not refusal:
                self._add(tenant)
        return refusal

    def _add(self, tenant: str) -> None:
        self._counts[tenant].own += 1
        for count in self._counts.values():
            count.queued += 1

    def _refusal(self, tenant: str, count: _Count) -> Refusal | None:
        """Return the refusal of one more job; an open service has no key to bound."""
        most, most_per_key = self._settings.max_queued, self._settings.max_queued_per_key
        if count.queued >= most:
            return Refusal(Code.TOO_MANY_QUEUED, bound="max_queued", most=most)
        if tenant != OPEN_TENANT and count.own >= most_per_key:
            return Refusal(Code.TOO_MANY_QUEUED, bound="max_queued_per_key", most=most_per_key)
        return None
