"""The bounds on queued jobs, without a count of the table for every submission."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from cluster.jobs.model import OPEN_TENANT
from cluster.jobs.queue import JobQueue
from serve_app.settings import GatewayArgs
from serve_app.wire.refusals import Code, Refusal

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

    def enter(self, tenant: str, jobs: int = 1) -> Refusal | None:
        """Count `jobs` more of `tenant` in, all or none; or return why there is no room. Blocking."""
        with self._lock:
            count = self._counts.get(tenant)
            if count and time.monotonic() < count.until and not self._refusal(tenant, count, jobs):
                self._add(tenant, jobs)
                return None
        until = time.monotonic() + COUNT_S
        count = _Count(until, *self._queue.waiting(tenant))
        refusal = self._refusal(tenant, count, jobs)
        with self._lock:
            self._counts[tenant] = count
            if not refusal:
                self._add(tenant, jobs)
        return refusal

    def _add(self, tenant: str, jobs: int) -> None:
        self._counts[tenant].own += jobs
        for count in self._counts.values():
            count.queued += jobs

    def _refusal(self, tenant: str, count: _Count, jobs: int) -> Refusal | None:
        """Return the refusal of so many more jobs; an open service has no key to bound."""
        bounds = [("max_queued", self._settings.max_queued, count.queued)]
        if tenant != OPEN_TENANT:
            bounds.append(("max_queued_per_key", self._settings.max_queued_per_key, count.own))
        for bound, most, _ in bounds:
            if jobs > most:
                return Refusal(Code.BATCH_TOO_LARGE, bound=bound, most=most)
        for bound, most, waiting in bounds:
            if waiting + jobs > most:
                return Refusal(Code.TOO_MANY_QUEUED, bound=bound, most=most)
        return None
